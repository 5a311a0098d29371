"""Published checkpoint files → a bundle, checked before it gets its name.

Memory: tensors are mapped from the file, cast and written shard by shard, and the check reads the bundle only after the
file is let go, so the peak is about the size of the larger file plus one shard (modelfolder.folder.SHARD_SIZE).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llamagen_unitok.config import Size
from llamagen_unitok.gpt import GPT
from llamagen_unitok.imagenet import imagenet_names
from llamagen_unitok.labels import LABELS_NAME, ClassNames
from llamagen_unitok.pipeline import CARD_NAME, DTYPES, ImageGenerator, check_fit
from llamagen_unitok.published.layouts import GENERATOR, TOKENIZER, WEIGHTS, PublishedFile, open_published
from llamagen_unitok.published.presets import generator_of_file, licence_of_file
from llamagen_unitok.runtime.distributed import pick_device
from llamagen_unitok.runtime.memory import explained_memory
from modelfolder import check_replaceable, file_hash, replacing_folder
from tokenizer import VQGAN, UniTok, load_tokenizer
from tokenizer.table import PART as TOKENIZER_PART

NAMES: dict[str, Callable[[], ClassNames]] = {"imagenet": imagenet_names}


@dataclass(frozen=True)
class Conversion:
    """What the files do not say, and what to make of them."""

    labels: str = field(
        default="imagenet", metadata={"help": "imagenet, a labels.json, or how many classes (numbered) there are"}
    )
    image_size: int | None = field(default=None, metadata={"help": "pixels of a picture's side, where no file says it"})
    heads: int | None = field(default=None, metadata={"help": "heads of a generator that has no published size"})
    weights: str = field(
        default="model", metadata={"help": "ema: averaged weights of a training checkpoint", "choices": WEIGHTS}
    )
    causal_projection: bool = field(
        default=False, metadata={"help": "UniTok's first release (February 2025): causal attention in its projections"}
    )
    text: bool = field(default=False, metadata={"help": "keep UniTok's text tower (needs open_clip)"})
    dtype: str | None = field(
        default=None,
        metadata={"help": "number type of the generator's stored weights (default: the file's)", "choices": [*DTYPES]},
    )
    picture: bool = field(default=True, metadata={"help": "draw one picture as a check: minutes for XXL on a CPU"})

    def __post_init__(self) -> None:
        for name in ("image_size", "heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.weights not in WEIGHTS:
            raise ValueError(f"--weights must be one of {', '.join(WEIGHTS)}, not {self.weights!r}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")


def convert(
    paths: list[Path],
    out: Path,
    settings: Conversion,
    *,
    device: str = "auto",
    progress: bool = False,
    size: Size | None = None,
) -> Path:
    """Write a bundle from a generator and a tokenizer file (in any order), or a tokenizer folder from one alone.

    device: of the check.   size: what the generator must have, where that is known beforehand.
    The result is complete and checked (shapes, random codes decoded, one picture drawn) or not there at all.
    Raises ValueError, in one line, for files that are not published checkpoints or do not belong together.
    """
    _check_out(out, paths)
    files = {}
    for path in paths:
        file = open_published(path, settings.weights)
        if file.layout.part in files:
            raise ValueError(
                f"{files[file.layout.part].path} and {path} are both {file.layout.part}s: give one of each"
            )
        files[file.layout.part] = file
    if TOKENIZER not in files:
        raise ValueError(f"{paths[0]} is a generator alone: give its tokenizer's file too")
    tokenizer_file, generator_file = files.pop(TOKENIZER), files.pop(GENERATOR, None)
    file = None  # the loop's reference would keep a file mapped
    tokenizer, image_size = read_tokenizer(tokenizer_file, generator_file, settings)
    if generator_file is None:
        with replacing_folder(out) as unfinished:
            tokenizer.save_pretrained(unfinished)
            del tokenizer, tokenizer_file
            check_tokenizer(unfinished)
        return out

    names = read_names(settings.labels)
    _check_classes(generator_file, len(names))
    # Types that nothing computes in, such as float64, become float32.
    own = generator_file.dtype if generator_file.dtype in DTYPES.values() else torch.float32
    stored = DTYPES[settings.dtype] if settings.dtype else own
    gpt = GPT.from_official(
        generator_file.tensors,
        num_classes=len(names),
        num_positions=tokenizer.config.num_positions,
        n_head=settings.heads or (size.heads if size else None),
        dtype=own,
    )
    config = gpt.config
    if size and Size(config.layers, config.heads, config.width) != size:
        raise ValueError(
            f"{generator_file.path} has {config.layers} layers of width {config.width}, but {size.layers} of width "
            f"{size.width} are expected: it is another checkpoint"
        )
    check_fit(config, tokenizer.config, where=f" ({generator_file.path} and {tokenizer_file.path})")
    card = _card(gpt, image_size, [generator_file, tokenizer_file])
    with replacing_folder(out) as unfinished:
        gpt.save_pretrained(unfinished / GPT.part, dtype=stored)
        tokenizer.save_pretrained(unfinished / TOKENIZER_PART)  # its codes would change in another type
        names.save(unfinished)
        (unfinished / CARD_NAME).write_text(card, encoding="utf-8")
        del gpt, tokenizer, generator_file, tokenizer_file  # unmaps the files, before the bundle is read
        check_bundle(unfinished, device=device, dtype=stored, picture=settings.picture, progress=progress)
    return out


def read_names(labels: str, flag: str = "--labels") -> ClassNames:
    """The class names that a flag means: a name in NAMES, a labels.json or its folder, or a number of classes."""
    if labels in NAMES:
        return NAMES[labels]()
    if labels.isdecimal() and int(labels):
        return ClassNames.numbered(int(labels))
    path = Path(labels)
    names = ClassNames.load(path.parent if path.name == LABELS_NAME else path)
    if names is None:
        raise ValueError(f"{flag} {labels} is no {LABELS_NAME}: give one, {', '.join(NAMES)}, or a number of classes")
    return names


def read_tokenizer(
    file: PublishedFile, generator: PublishedFile | None, settings: Conversion
) -> tuple[UniTok | VQGAN, int]:
    """The tokenizer of a file, and the size of its pictures in pixels.

    The size is what the files, a published file name or --image-size say; ValueError if they say different things or
    nothing, or if the generator was trained on another grid than the tokenizer has at that size.
    """
    pixels: dict[str, int] = {}
    grids: dict[str, int] = {}
    if settings.image_size:
        pixels["--image-size"] = settings.image_size
    if file.layout.name == "unitok":
        pixels[file.path.name] = _whole(file, "img_size") or 256
    if generator is not None:
        name = generator.path.name
        if row := generator_of_file(name):
            pixels[name], grids[name] = row.image_size, row.grid
        if image_size := _whole(generator, "image_size"):
            pixels[f"{name} (its arguments)"] = image_size
            if cell := _whole(generator, "downsample_size"):
                grids[f"{name} (its arguments)"] = image_size // cell
        if generator.rotation_rows:
            grids[f"{name} (its rotation table)"] = math.isqrt(generator.rotation_rows - 1)
    if len(set(pixels.values())) > 1:
        told = ", ".join(f"{source} says {value}" for source, value in pixels.items())
        raise ValueError(f"the picture size is not clear: {told} pixels; give files and --image-size that agree")
    image_size = next(iter(pixels.values()), None)
    if image_size is None and generator is None:
        image_size = 256
    if image_size is None:
        raise ValueError(
            f"{generator.path} does not hold the size of its pictures: give it, as in --image-size 256 or 384"
        )
    if file.layout.name == "unitok":
        args = {**file.args, "causal_projection": settings.causal_projection or file.args.get("causal_projection")}
        tokenizer = UniTok.from_official(args, file.tensors, text=settings.text)
    else:
        tokenizer = VQGAN.from_official(file.tensors, img_size=image_size)
    grid = tokenizer.config.grid
    for source, value in grids.items():
        if value != grid:
            raise ValueError(
                f"{source} was trained on grids of {value}×{value} codes, but {file.path.name} at {image_size} pixels "
                f"gives {grid}×{grid}: give the right --image-size, or another tokenizer"
            )
    return tokenizer, image_size


def _whole(file: PublishedFile, argument: str) -> int | None:
    """An argument of training that is a number of pixels; ValueError for anything else."""
    value = file.args.get(argument)
    try:
        return None if value is None else int(value)
    except (TypeError, ValueError):
        raise ValueError(f"{file.path} says {argument}={value!r} among its arguments, which is no number") from None


def check_tokenizer(folder: Path) -> None:
    """Load a tokenizer folder and decode random codes; ValueError unless they give a finite picture of its size."""
    tokenizer = load_tokenizer(folder)
    config = tokenizer.config
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(config.codebook_size, (1, config.num_positions, config.num_codebooks), generator=generator)
    image = tokenizer.decode_unclamped(codes)
    expected = (1, 3, config.img_size, config.img_size)
    if tuple(image.shape) != expected or not image.isfinite().all():
        raise ValueError("the converted tokenizer does not decode random codes: its weights are damaged")
    if image.std(dim=(2, 3)).max() == 0:
        raise ValueError("the converted tokenizer decodes random codes to one colour: its weights are damaged")


def check_bundle(folder: Path, *, device: str, dtype: torch.dtype, picture: bool, progress: bool = False) -> None:
    """Load a bundle as a user would; ValueError unless it decodes random codes and, with `picture`, draws class 0.

    dtype: the stored one; another would need memory for a second copy on a CPU. On CUDA it draws in bfloat16.
    """
    check_tokenizer(folder)
    chosen = pick_device(device)
    with explained_memory("while checking the bundle: give --device cpu, or --no-picture"):
        generator = ImageGenerator.from_pretrained(
            folder, device=chosen, dtype=torch.bfloat16 if chosen.type == "cuda" else dtype
        )
        if picture:
            # The plain engine: a faster one keeps a copy of the weights in a layout of its own.
            generator([0], batch_size=1, progress=progress, engine="eager")


def _check_out(out: Path, inputs: list[Path]) -> None:
    """A folder that is replaced must be one that was made like this, and hold none of the inputs."""
    try:
        check_replaceable(out)
    except ValueError as error:
        raise ValueError(f"--out {error}") from None
    for path in inputs:
        if out.resolve() in path.resolve().parents:
            raise ValueError(f"--out {out} would replace the folder that {path} lies in: give another one")


def _check_classes(file: PublishedFile, num_classes: int) -> None:
    """ValueError where the arguments of training say something else about classes than the labels do."""
    told = file.args.get("num_classes")
    if told is not None and told != num_classes:
        raise ValueError(f"{file.path} was trained on {told} classes, but --labels has {num_classes} of them")


def _card(gpt: GPT, image_size: int, files: list[PublishedFile]) -> str:
    """A model card that names the sources, by content, and their licences where they are known."""
    config = gpt.config
    licences = [licence_of_file(file.path.name) for file in files]
    known = sorted({licence for licence in licences if licence})
    front = f"license: {known[0]}\n" if len(known) == 1 and all(licences) else ""
    rows = "".join(
        f"| `{file.path.name}` | {file.layout.title} | {licence or 'not known'} | `{file_hash(file.path)}` |\n"
        for file, licence in zip(files, licences, strict=True)
    )
    guidance = "any `--cfg`" if config.has_null_class else "`--cfg 1` only, since it has no null class"
    published = generator_of_file(files[0].path.name)
    figures = (
        f"\nIts authors report FID {published.fid} at 256×256 with `--cfg {published.cfg_scale:g}` "
        f"({published.source}); this conversion has not been measured.\n"
        if published
        else ""
    )
    return (
        f"---\nlibrary_name: llamagen-unitok\n{front}tags: [image-generation, autoregressive]\n---\n\n"
        f"# Converted checkpoint: {files[0].path.stem}\n\n"
        f"{config.num_classes} classes, pictures of {image_size}×{image_size} pixels as {config.grid}×{config.grid} "
        f"positions of {config.num_codebooks} codes, {config.layers} layers of width {config.width}; {guidance}.\n"
        f"{figures}\nConverted, not trained, by this project, from\n\n"
        f"| file | what | licence | SHA-256 |\n|---|---|---|---|\n{rows}\n"
        "    python sample.py --checkpoint THIS_FOLDER --class 207\n"
    )
