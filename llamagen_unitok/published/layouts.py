"""The table of published layouts: what a checkpoint file holds, whoever wrote it.

To add a layout, write a function (checkpoint, weights) → state dict or None, and add a row to LAYOUTS.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from llamagen_unitok.official import CLASS_TABLE, ROTATION_TABLE, WRAPPER_KEYS, published_state, read_config, unwrapped
from llamagen_unitok.published.files import read_checkpoint
from tokenizer.vqgan import config_from_tensors

WEIGHTS = ("model", "ema")  # what a training checkpoint offers
GENERATOR, TOKENIZER = "generator", "tokenizer"
# Arguments of training that say something about a model, for --inspect.
TELLING_ARGUMENTS = (
    *("gpt_model", "image_size", "downsample_size", "num_classes", "class_dropout_prob", "vocab_size", "num_codebooks"),
    *("model", "img_size", "vocab_width", "quant_proj", "embed_dim"),
)


class Layout(NamedTuple):
    """A kind of file.

    find: (checkpoint, "model" or "ema") → its tensors under our names, or None if it is a file of another kind.
    """

    name: str
    part: str
    title: str
    find: Callable[[Any, str], dict[str, Tensor] | None]


@dataclass(frozen=True)
class PublishedFile:
    """A checkpoint file that was recognised. args: the training script's arguments, empty where it has none."""

    path: Path
    layout: Layout
    tensors: dict[str, Tensor]
    args: dict[str, Any]
    wrapping: str
    rotation_rows: int | None

    @property
    def dtype(self) -> Any:
        """The type of most of the tensors."""
        return Counter(tensor.dtype for tensor in self.tensors.values()).most_common(1)[0][0]


def _unitok(checkpoint: Any, weights: str) -> dict[str, Tensor] | None:
    trainer = checkpoint.get("trainer")
    state = trainer.get("unitok") if isinstance(trainer, Mapping) else None
    return dict(state) if isinstance(state, Mapping) else None


def _with_entry(entry: str) -> Callable[[Any, str], dict[str, Tensor] | None]:
    """Wrapped or bare state dicts that are recognised by one of their names."""

    def find(checkpoint: Any, weights: str) -> dict[str, Tensor] | None:
        try:
            tensors = published_state(checkpoint if weights == "model" else checkpoint.get(weights, {}))
        except ValueError:
            return None
        return tensors if entry in tensors else None

    return find


def _vqgan(checkpoint: Any, weights: str) -> dict[str, Tensor] | None:
    # --weights is about the generator: a published tokenizer beside it has one set of weights.
    return _with_entry("quantize.embedding.weight")(checkpoint, weights if weights in checkpoint else "model")


LAYOUTS = (
    Layout("unitok", TOKENIZER, "UniTok tokenizer", _unitok),
    Layout("vqgan", TOKENIZER, "LlamaGen VQ tokenizer", _vqgan),
    Layout("unitok-llamagen", GENERATOR, "UniTok-LlamaGen generator", _with_entry("tok_embeddings.codebooks.0.weight")),
    Layout("llamagen", GENERATOR, "LlamaGen generator", _with_entry(CLASS_TABLE)),
)


def open_published(path: Path, weights: str = "model") -> PublishedFile:
    """Read a file and say what it holds; ValueError, in one line, for a file of no known layout.

    weights: "ema" takes the averaged weights of a training checkpoint.
    """
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    for layout in LAYOUTS:
        tensors = layout.find(checkpoint, weights)
        if tensors is not None:
            return PublishedFile(
                path=path,
                layout=layout,
                tensors=tensors,
                args=_arguments(checkpoint.get("args")),
                wrapping=_wrapping(checkpoint, weights),
                rotation_rows=_rotation_rows(checkpoint),
            )
    keys = ", ".join(str(key) for key in list(checkpoint)[:4])
    averaged = " with ema weights" if weights == "ema" else ""
    titles = ", ".join(layout.title for layout in LAYOUTS)
    raise ValueError(f"{path} is none of the files that can be read{averaged} ({titles}); it begins with {keys}")


def describe(file: PublishedFile) -> Iterator[str]:
    """What --inspect prints about a file, line by line."""
    count = sum(tensor.numel() for tensor in file.tensors.values())
    kind = str(file.dtype).removeprefix("torch.")
    yield f"{file.path}: {file.layout.title}, {file.wrapping}"
    yield f"  {len(file.tensors)} tensors, {count:,} numbers, {kind}"
    if file.layout.part == GENERATOR:
        yield f"  {_generator_shape(file)}"
        if file.rotation_rows:
            side = math.isqrt(file.rotation_rows - 1)
            yield f"  a grid of {side}×{side} positions, by its rotation table"
    elif file.layout.name == "vqgan":
        config = config_from_tensors(file.tensors, img_size=256)
        yield f"  cells of {config.patch} pixels, {config.codebook_size} entries of {config.code_width} channels"
    told = {name: file.args[name] for name in TELLING_ARGUMENTS if name in file.args}
    if told:
        yield "  arguments: " + ", ".join(f"{name}={value}" for name, value in told.items())


def _generator_shape(file: PublishedFile) -> str:
    rows = file.tensors[CLASS_TABLE].shape[0]
    try:
        config = read_config(file.tensors, num_classes=rows)
    except ValueError as error:
        return f"{rows} rows in the class table; {error} (--heads)"
    return (
        f"{config.layers} layers of width {config.width}, {config.heads} heads, {config.num_codebooks} codebooks of "
        f"{config.codebook_size} entries, {config.depth_layers} depth layers, {rows} rows in the class table"
    )


def _arguments(args: object) -> dict[str, Any]:
    if isinstance(args, Mapping):
        return dict(args)
    return dict(vars(args)) if isinstance(args, argparse.Namespace) else {}


def _wrapping(checkpoint: Mapping, weights: str) -> str:
    if "trainer" in checkpoint:
        return "under trainer.unitok"
    if weights == "ema":
        return "under ema"
    keys = []
    while inner := [key for key in WRAPPER_KEYS if isinstance(checkpoint.get(key), Mapping)]:
        keys.append(inner[0])
        checkpoint = checkpoint[inner[0]]
    return f"under {'.'.join(keys)}" if keys else "a bare state dict"


def _rotation_rows(checkpoint: Mapping) -> int | None:
    """Sequence positions of a stored rotation table: the only tensor that knows the grid."""
    state = unwrapped(checkpoint)
    tables = [t for name, t in state.items() if str(name).split(".")[-1] == ROTATION_TABLE and isinstance(t, Tensor)]
    rows = tables[0].shape[0] if tables and tables[0].ndim else None
    # The class position and a square grid; anything else is no such table.
    return rows if rows and math.isqrt(rows - 1) ** 2 == rows - 1 else None
