"""Training a generator: code shards → GPT (LlamaGen, arXiv 2406.06525; UniTok, arXiv 2502.20321, section 4)."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamagen_unitok.config import GPTConfig
from llamagen_unitok.cross_entropy import LossTerms
from llamagen_unitok.gpt import GPT
from llamagen_unitok.runtime.checkpoint import find_checkpoint
from llamagen_unitok.runtime.distributed import World
from llamagen_unitok.runtime.files import replacing
from llamagen_unitok.runtime.log import tell
from llamagen_unitok.training.data import CodeMeta, CodeShards, TrainingCodes
from llamagen_unitok.training.finetune import start_from
from llamagen_unitok.training.flops import flops_per_image, peak_flops
from llamagen_unitok.training.loop import LoopConfig, Watcher, train
from llamagen_unitok.training.resuming import CHANGES
from llamagen_unitok.training.validation import Part, Validation, split

CONFIG_NAME = "config.json"
DEPTH_LAYERS = 4  # of a head over several codebooks, as published


@dataclass(frozen=True)
class GeneratorTraining:
    """Settings of a generator run beside the loop's. Shapes that are None come from the size that --model names."""

    codes: Path | None = field(default=None, metadata={"help": "folder of code shards that extract_codes.py wrote"})
    model: str = field(default="B", metadata={"help": "size: B, L, XL, XXL, XXXL, 1B, 3B, 7B"})
    layers: int | None = field(default=None, metadata={"help": "trunk layers, if not the size's"})
    heads: int | None = field(default=None, metadata={"help": "attention heads, if not the size's"})
    width: int | None = field(default=None, metadata={"help": "channels, if not the size's"})
    depth_layers: int | None = field(
        default=None, metadata={"help": "layers of the depth head (default 4; 0 with one codebook, which has none)"}
    )
    ffn_multiple: int = field(default=256, metadata={"help": "feed-forward width is rounded up to a multiple of this"})
    dropout: float = field(default=0.1, metadata={"help": "on embeddings, residual branches and feed-forward, 0 to 1"})
    class_dropout: float = field(
        default=0.1, metadata={"help": "share of labels dropped, 0 to 1; 0 = a generator without guidance"}
    )
    qk_norm: bool = field(
        default=False, metadata={"help": "norm queries and keys (QK-norm, arXiv 2010.04245, 2302.05442)"}
    )
    z_loss: float = field(
        default=0.0, metadata={"help": "weight of the squared log normaliser (z-loss, PaLM, arXiv 2204.02311: 1e-4)"}
    )
    head_share: float = field(
        default=1.0, metadata={"help": "random share of positions that the head's loss is taken at (CSM, Sesame 2025)"}
    )
    held_out: float = field(
        default=0.0, metadata={"help": "share of the pictures, chosen by the seed, that is never trained on, 0 to 1"}
    )
    validate_every: int = field(default=0, metadata={"help": "steps between losses of --held-out pictures; 0 = never"})
    preview_every: int = field(default=0, metadata={"help": "steps between previews; 0 = one at each checkpoint"})
    peak_tflops: float | None = field(
        default=None, metadata={"help": "what MFU is a share of, per device; default by the GPU's name"}
    )
    init: str | None = field(
        default=None, metadata={"help": "start from this bundle or generator, whose classes may differ"}
    )
    verify: bool = field(default=False, metadata={"help": "check the shards' checksums before training"})

    def __post_init__(self) -> None:
        for name in ("dropout", "class_dropout", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must lie in [0, 1), not {getattr(self, name)}")
        if not 0 < self.head_share <= 1:
            raise ValueError(f"--head-share must lie in (0, 1], not {self.head_share}")
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(f"--z-loss must be 0 or above, not {self.z_loss}")
        if min(self.validate_every, self.preview_every) < 0:
            raise ValueError("--validate-every and --preview-every must be 0 or above")
        if bool(self.held_out) != bool(self.validate_every):
            raise ValueError("--held-out and --validate-every belong together: give both or neither")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ValueError(f"--peak-tflops must be above 0, not {self.peak_tflops}")

    def architecture(self, shards: CodeShards) -> GPTConfig:
        """The generator for these codes."""
        return self.architecture_for(shards.meta)

    def architecture_for(self, meta: CodeMeta) -> GPTConfig:
        """The generator for codes that are described so."""
        changes = {name: value for name in ("layers", "heads", "width") if (value := getattr(self, name)) is not None}
        depth_layers = self.depth_layers
        if depth_layers is None:
            depth_layers = DEPTH_LAYERS if meta.num_codebooks > 1 else 0
        return GPTConfig.preset(
            self.model,
            **changes,
            num_classes=len(meta.class_names),
            has_null_class=self.class_dropout > 0,
            num_positions=meta.num_positions,
            num_codebooks=meta.num_codebooks,
            codebook_size=meta.codebook_size,
            depth_layers=depth_layers,
            ffn_multiple=self.ffn_multiple,
            qk_norm=self.qk_norm,
            token_dropout=self.dropout,
            residual_dropout=self.dropout,
            ffn_dropout=self.dropout,
        )


def generator_loss(
    terms: LossTerms, z_loss: float = 0.0, weights: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, what to log) of terms (B, n, K): the mean cross-entropy, in nats, plus `z_loss` times the mean of log² Z.

    z_loss: keeps the normaliser near 1 (PaLM, arXiv 2204.02311, section 5, with 1e-4).
    weights: (B,), how much each picture counts; they may all be 0.
    Logged are the cross-entropy alone (``loss``), that of each codebook (``loss_codebook_0`` …), and ``z_loss``, the
    mean of log² Z before its weight, where it has one.
    """

    def mean(values: Tensor) -> Tensor:  # (B, n, K) → (K,)
        per_picture = values.mean(1)
        if weights is None:
            return per_picture.mean(0)
        return weights @ per_picture / weights.sum().clamp_min(1e-9)

    per_codebook = mean(terms.nll)
    loss = per_codebook.mean()
    logged = {"loss": loss, **{f"loss_codebook_{k}": per_codebook[k].clone() for k in range(len(per_codebook))}}
    if not z_loss:
        return loss, logged
    log_z_squared = mean(terms.log_z.square()).mean()
    return loss + z_loss * log_z_squared, {**logged, "z_loss": log_z_squared}


class GeneratorObjective(nn.Module):
    """forward(labels (B,), codes (B, L, K), draws (B,)) → (loss, terms to log: the cross-entropy, in all and of each
    codebook).

    In train() only, a label is dropped where its draw, in [0, 1), is below `class_dropout`, and the positions of
    `head_share` follow from the draws too.
    """

    def __init__(self, gpt: GPT, class_dropout: float, *, head_share: float = 1.0, z_loss: float = 0.0):
        super().__init__()
        self.gpt, self.class_dropout, self.head_share, self.z_loss = gpt, class_dropout, head_share, z_loss

    def forward(
        self, labels: Tensor, codes: Tensor, draws: Tensor | None = None, *, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """weights (B,): how much each picture counts in the means; default all the same."""
        if self.training and self.class_dropout and draws is not None:
            labels = labels.masked_fill(draws < self.class_dropout, self.gpt.config.num_classes)
        terms = self.gpt(labels, codes, return_terms=True, head_share=self.head_share, draws=draws)
        return generator_loss(terms, self.z_loss, weights)

    def blocks(self) -> list[nn.Module]:
        """The trunk's blocks and the depth head's."""
        return [*self.gpt.layers, *getattr(self.gpt.output, "layers", ())]

    def after_step(self, step: int, world: World) -> None:
        """Nothing to look after."""


def train_generator(
    settings: GeneratorTraining,
    loop: LoopConfig,
    *,
    out: Path,
    resume: str,
    world: World,
    preview: Callable[[GPT, Path], None] | None = None,
    record: dict[str, Any] | None = None,
    announce: Callable[[], None] | None = None,
) -> Path:
    """Train a generator and leave it as a model folder; returns ``OUT/generator``, rewritten at every checkpoint.

    ``OUT/config.json`` holds the architecture, all settings, the changes of settings on the way, and `record`, which
    says where they came from. With a checkpoint to go on from, --init is not read.

    announce(): called on the main process before the first step, when all settings are known to be sound.
    preview(gpt, png): called with the weights to pass on, after each checkpoint or every `preview_every` steps, to draw
    pictures of them. The trainer knows no tokenizer; whoever calls it does. What fails in it is told in one line.
    """
    if settings.codes is None:
        raise ValueError("--codes is missing: give a folder of code shards")
    shards = CodeShards(settings.codes)
    if settings.verify:
        world.share_outcome(shards.verify)
    config = settings.architecture(shards)
    torch.manual_seed(loop.seed)
    gpt = GPT(config)
    if settings.init and world.share_outcome(lambda: find_checkpoint(out, resume)) is None:
        kept = start_from(gpt, settings.init, shards.meta.class_names)
        if world.is_main:
            print(f"--init {settings.init}: {kept} of {config.num_classes} classes are known there", file=sys.stderr)
    objective = GeneratorObjective(gpt, settings.class_dropout, head_share=settings.head_share, z_loss=settings.z_loss)
    trained, held_out = split(len(shards), settings.held_out, loop.seed)
    dataset = TrainingCodes(shards, loop.seed)
    if len(held_out):
        dataset = Part(dataset, trained)
    flops = flops_per_image(config, settings.head_share).total
    peak = peak_flops(world.device, settings.peak_tflops)

    def save_config(changes: list[dict[str, Any]]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        parts = {"model": config, "training": settings, "loop": loop}
        resolved = {
            **(record or {}),
            **{name: dataclasses.asdict(part) for name, part in parts.items()},
            CHANGES: changes,
        }
        with replacing(out / CONFIG_NAME) as file:
            file.write((json.dumps(resolved, indent=2, default=str) + "\n").encode())
        if announce:
            announce()

    def figures(images_per_sec: float) -> dict[str, float]:
        achieved = images_per_sec * flops / world.size
        return {"tflops": achieved / 1e12, **({"mfu": achieved / peak} if peak else {})}

    def generator_of(state: dict[str, Tensor]) -> GPT:
        with torch.device("meta"):
            passed = GPT(config)
        return passed.load_exactly({name.removeprefix("gpt."): tensor for name, tensor in state.items()}, out)

    def draw(passed: GPT, step: int) -> None:
        try:
            preview(passed.to(world.device).eval(), out / "previews" / f"step-{step:08d}.png")
        except (RuntimeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            tell(f"no preview of step {step}: {reason or type(error).__name__}")

    def pass_on(state: dict[str, Tensor], step: int) -> None:
        passed = generator_of(state)
        passed.save_pretrained(out / "generator")
        if preview and not settings.preview_every:
            draw(passed, step)

    def watch_preview(step: int, weights: Callable[[], dict[str, Tensor]]) -> dict[str, float]:
        if step % settings.preview_every == 0:
            state = weights()
            if preview:
                draw(generator_of(state), step)
            world.barrier()  # it waits for hours if need be, as the groups of sharded layers do not
        return {}

    watchers: list[Watcher] = []
    if settings.validate_every:
        bf16 = loop.precision == "bf16"
        every = settings.validate_every
        watchers.append(Validation(objective, shards, held_out, every=every, bf16=bf16, world=world))
    if settings.preview_every:
        watchers.append(watch_preview)

    train(
        objective,
        dataset,
        loop,
        out=out,
        resume=resume,
        world=world,
        meta={
            "model": dataclasses.asdict(config),
            "class_dropout": settings.class_dropout,
            "head_share": settings.head_share,
            "z_loss": settings.z_loss,
            "init": settings.init,
            "tokenizer_hash": shards.meta.tokenizer_hash,
            "codes": shards.meta.fingerprint,
            "pictures": len(shards),
            "held_out": settings.held_out,
        },
        on_save=pass_on,
        on_start=save_config,
        watchers=watchers,
        figures=figures,
    )
    return out / "generator"
