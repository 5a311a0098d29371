"""Before a run: are these the codes, classes and tokenizer that were meant, and is there room for the checkpoints?

Wrong codes and another class order train without any error, and show only in the pictures, days later.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llamagen_unitok.config import GPTConfig, code_differences
from llamagen_unitok.gpt import GPT
from llamagen_unitok.grid import labelled_grid
from llamagen_unitok.labels import ClassNames, check_classes
from llamagen_unitok.runtime.checkpoint import complete_checkpoints, find_checkpoint, read_meta
from llamagen_unitok.runtime.distributed import World
from llamagen_unitok.runtime.files import replacing
from llamagen_unitok.training.data import CodeMeta, CodeShards
from llamagen_unitok.training.generator import GeneratorTraining
from llamagen_unitok.training.loop import LoopConfig
from modelfolder import content_hash, locate
from tokenizer import load_tokenizer, read_tokenizer_config, tokenizer_folder
from tokenizer.images import to_pil

PICTURE_NAME = "preflight.png"
DECODED = 8  # entries in the picture
LOOKED_AT = 256  # entries whose codes are looked at


@dataclass(frozen=True)
class Report:
    """What will run. doubts: what is possible but seldom meant, each in one line."""

    facts: dict[str, str]
    doubts: list[str]

    def __str__(self) -> str:
        width = max(map(len, self.facts))
        lines = [f"{name:<{width}}  {fact}" for name, fact in self.facts.items()]
        return "\n".join([*lines, *(f"!  {doubt}" for doubt in self.doubts)])

    def check(self) -> None:
        """ValueError, in one line, if there are doubts."""
        if self.doubts:
            raise ValueError(f"--check: {'; '.join(self.doubts)}")


def preflight(
    settings: GeneratorTraining,
    loop: LoopConfig,
    *,
    out: Path,
    resume: str,
    world: World,
    tokenizer: str | Path | None = None,
    names: ClassNames | None = None,
    recipe: str | None = None,
    thorough: bool = False,
) -> Report:
    """Check a run of train_generator before it starts; seconds, or all bytes of the shards if `thorough`.

    Always: shapes of the shards; random codes and all labels within their ranges; K, V and grid of `tokenizer` and of
    the generator that --init names; class names and their order; free disk for the checkpoints. With a tokenizer (path
    or hub id), random codes are decoded into OUT/preflight.png, each under the name of its class.
    tokenizer: default the folder that the codes say they come from, if it is there; that it is another is a doubt then.
    names: what the labels should mean.   recipe: what is said of it.
    Every process of `world` must call this; the main one does the work.
    Raises ValueError, in one line, for what cannot be meant; another tokenizer's hash, and an --init with other class
    names, are doubts.
    """

    def inspect() -> Report:
        return _inspect(settings, loop, out, resume, world, tokenizer, names, recipe, thorough)

    return world.share_outcome(inspect)


def _inspect(
    settings: GeneratorTraining,
    loop: LoopConfig,
    out: Path,
    resume: str,
    world: World,
    tokenizer: str | Path | None,
    names: ClassNames | None,
    recipe: str | None,
    thorough: bool,
) -> Report:
    shards = CodeShards(settings.codes)
    meta, config = shards.meta, settings.architecture(shards)
    share = world.share(loop.batch_size)
    doubts = _check_codes(shards)
    facts = {"generator": _generator_fact(config, settings)}
    facts["codes"] = (
        f"{settings.codes}: {len(shards):,} pictures × {len(meta.views)} views, {meta.grid}×{meta.grid} positions, "
        f"K={meta.num_codebooks}, V={meta.codebook_size}, by {meta.tokenizer} ({meta.tokenizer_hash[:12]})"
    )
    facts["classes"] = _classes_fact(shards)
    if names is not None:
        check_classes(names, meta.class_names, what="class of the codes")
    start = find_checkpoint(out, resume)
    if settings.init and start is None:
        doubts += _check_init(Path(locate(settings.init)), meta)
    if thorough:
        shards.verify()
        facts["checksums"] = f"all {len(shards.paths)} shards are whole"
    folder, named = None, tokenizer is not None
    if named:
        folder = locate(tokenizer)
        _check_shapes(f"tokenizer {tokenizer}", read_tokenizer_config(folder), meta)
    elif Path(meta.tokenizer).is_dir():
        tokenizer = meta.tokenizer
        try:
            folder = locate(tokenizer)
            _check_shapes(f"tokenizer {tokenizer}", read_tokenizer_config(folder), meta)
        except ValueError as error:
            folder = None
            doubts.append(f"what the codes call their tokenizer is another one now: {error}")
    if folder is not None:
        made_them = content_hash(tokenizer_folder(folder)) == meta.tokenizer_hash
        if not made_them:
            doubts.append(
                f"the codes were made by another tokenizer than {tokenizer} (content hash {meta.tokenizer_hash[:12]}); "
                f"right only if encoder and codebooks are the same: look at {out / PICTURE_NAME}"
            )
    step = 0 if start is None else int(read_meta(start)["step"])
    epochs = loop.steps * loop.batch_size / len(shards)
    facts["run"] = (
        f"{out}: steps {step:,} to {loop.steps:,} of {loop.batch_size:,} pictures, {epochs:.4g} epochs; lr {loop.lr:g} "
        f"{loop.lr_schedule}, {loop.warmup_steps:,} steps of warm-up; {loop.precision}; dropout {settings.dropout:g}, "
        f"of classes {settings.class_dropout:g}"
    )
    if recipe is not None:
        facts["recipe"] = recipe
    facts["processes"] = (
        f"{world.size} × {_device_name(world.device)}, {share:,} pictures a step each"
        f"{f' in {loop.accumulate} parts' if loop.accumulate > 1 else ''}; parallel {loop.parallel}, compile "
        f"{loop.compile}, recomputed activations {loop.checkpoint_activations}"
    )
    facts["disk"] = _disk_fact(config, loop, out)
    if folder is not None:
        try:
            _draw(shards, load_tokenizer(folder).to(world.device), out, world.device, loop.seed)
            made = ": made these codes" if made_them else ""
            facts["tokenizer"] = f"{tokenizer}{made}; {out / PICTURE_NAME} shows some"
        except (ValueError, RuntimeError) as error:
            if named:
                raise
            doubts.append(f"{tokenizer}, which made the codes, does not draw them: {' '.join(str(error).split())}")
    return Report(facts, doubts)


def _check_codes(shards: CodeShards) -> list[str]:
    """Doubts about the codes of random entries; ValueError for codes beyond the codebooks."""
    meta = shards.meta
    chosen = np.random.default_rng(0).integers(len(shards), size=min(LOOKED_AT, len(shards)))
    _, codes = shards.entries(chosen.tolist())
    if codes.max() >= meta.codebook_size:
        raise ValueError(f"{shards.folder} has code {codes.max()}, but codebooks have {meta.codebook_size} entries")
    same = [k for k in range(meta.num_codebooks) if codes[..., k].min() == codes[..., k].max()]
    return [f"codebook {k} has code {codes[0, 0, 0, k]} everywhere in {len(chosen)} pictures" for k in same]


def _classes_fact(shards: CodeShards) -> str:
    """How many pictures the classes have. ValueError for labels that are no class."""
    names, labels = shards.meta.class_names, shards.labels()
    if labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(f"{shards.folder} has labels {labels.min()} to {labels.max()}, but {len(names)} class names")
    counts = np.bincount(labels, minlength=len(names))
    empty = int((counts == 0).sum())
    return (
        f"{len(names):,}, {counts.min():,} to {counts.max():,} pictures each; 0 is {names[0]!r}, {len(names) - 1} is "
        f"{names[-1]!r}" + (f"; {empty:,} have none" if empty else "")
    )


def _check_init(folder: Path, meta: CodeMeta) -> list[str]:
    """Doubts about a bundle or generator to start from; ValueError if it cannot read these codes."""
    config = GPT.read_config(GPT.part_of(folder))
    _check_shapes(f"--init {folder}", config, meta)
    doubts = []
    own_tokenizer, names = tokenizer_folder(folder), ClassNames.load(folder)
    if own_tokenizer != folder and content_hash(own_tokenizer) != meta.tokenizer_hash:
        doubts.append(f"the tokenizer in --init {folder} is not, byte for byte, the one that made the codes")
    if names is not None and len(names) == len(meta.class_names):
        try:
            check_classes(names, meta.class_names, what="class of the codes")
        except ValueError as error:
            doubts.append(f"--init {folder} has other class names: {error}")
    return doubts


def _check_shapes(what: str, config: Any, meta: CodeMeta) -> None:
    """ValueError unless a tokenizer or generator has the K, V and L of the codes."""
    differing = code_differences(config, meta)
    if differing:
        raise ValueError(f"{what} does not fit the codes: {', '.join(differing)}; give the one they were made with")


def _generator_fact(config: GPTConfig, settings: GeneratorTraining) -> str:
    start = f"weights of {settings.init}" if settings.init else "random weights"
    null_class = "with a null class" if config.has_null_class else "no null class, so no guidance"
    return (
        f"{_parameters(config):,} parameters: {config.layers} layers of width {config.width}, {config.depth_layers} in "
        f"the depth head, {null_class}; {start}"
    )


def _parameters(config: GPTConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(config).parameters())


def _disk_fact(config: GPTConfig, loop: LoopConfig, out: Path) -> str:
    """Free disk against what the run will still write. ValueError if it is too little."""
    tensors = 1 + 2 + bool(loop.ema)  # weights, AdamW's two means, averaged weights; all fp32
    checkpoint = 4 * tensors * _parameters(config)
    # one more than are kept while the newest is written; the generator to pass on is written beside its old self
    milestones = loop.steps // loop.keep_every if loop.keep_every else 0
    missing = max(loop.keep + milestones + 1 - len(complete_checkpoints(out)), 1)
    needed = missing * checkpoint + 2 * 4 * _parameters(config)
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(
            f"--out {out} needs {needed / 1e9:.3g} GB for checkpoints of {checkpoint / 1e9:.3g} GB, but only "
            f"{free / 1e9:.3g} GB are free: make room, or give a smaller --keep or another --out"
        )
    kept = f"{loop.keep}{f' and {milestones} milestones' if milestones else ''}"
    return f"{checkpoint / 1e9:.3g} GB a checkpoint, {kept} are kept; {free / 1e9:,.4g} GB are free"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@torch.no_grad()
def _draw(shards: CodeShards, tokenizer: Any, out: Path, device: torch.device, seed: int) -> None:
    rng = np.random.default_rng([seed, len(shards)])
    groups = []
    for index in rng.choice(len(shards), size=min(DECODED, len(shards)), replace=False):
        label, codes = shards[int(index), int(rng.integers(len(shards.meta.views)))]
        groups.append(
            (shards.meta.class_names[label], to_pil(tokenizer.decode(torch.from_numpy(codes)[None].to(device))))
        )
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / PICTURE_NAME) as file:
        labelled_grid(groups).save(file, format="PNG")
