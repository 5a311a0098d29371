"""From a training checkpoint to a generator that can be passed on."""

from __future__ import annotations

from pathlib import Path

import torch

from llamagen_unitok.config import GPTConfig
from llamagen_unitok.gpt import GPT
from llamagen_unitok.runtime.checkpoint import find_checkpoint, read_meta, read_tensors

# What --export-weights names → the parts of a checkpoint that may hold it; the first one that is there counts.
WEIGHTS = {"auto": ("ema", "model"), "ema": ("ema",), "raw": ("model",)}
_PREFIX = "gpt."  # of the generator within the objective


def load_trained(run: str | Path, weights: str = "auto") -> GPT:
    """The generator of a run's newest complete checkpoint, or of a checkpoint folder itself, in eval mode on the CPU.

    weights: "ema", the averaged ones; "raw"; or "auto", the averaged ones if there are any. The run may be going on,
    and may have had any number of processes.
    Raises ValueError when there is no complete checkpoint of a generator, or none with averaged weights.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"--export-weights must be one of {', '.join(WEIGHTS)}, not {weights!r}")
    run = Path(run)
    path = find_checkpoint(run, "auto") or find_checkpoint(run, str(run))
    config = read_meta(path).get("model", {})
    tensors = next((found for part in WEIGHTS[weights] if (found := read_tensors(path, part))), {})
    if weights == "ema" and not tensors:
        raise ValueError(f"{path} has no averaged weights, for the run had --ema 0: export with --export-weights raw")
    try:
        shape = GPTConfig(**config)
    except TypeError:
        raise ValueError(f"{path} is no checkpoint of a generator: give a folder that train_gpt.py wrote") from None
    with torch.device("meta"):
        gpt = GPT(shape)
    return gpt.load_exactly({name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}, path)


def export(run: str | Path, out: str | Path, weights: str = "auto") -> Path:
    """Write the generator of `load_trained` as a folder of its own, complete or not at all; returns it."""
    return load_trained(run, weights).save_pretrained(out)
