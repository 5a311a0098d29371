"""Engines: ways to run one position of a generator. Decoding is the same loop over any of them."""

from __future__ import annotations

from collections.abc import Callable

from llamagen_unitok.gpt import GPT
from llamagen_unitok.sampling.fixed import CompiledEngine, GraphEngine
from llamagen_unitok.sampling.kept import Kept
from llamagen_unitok.sampling.packed import PackedEngine
from llamagen_unitok.sampling.steps import EagerEngine, Engine, Run

# To add an engine, add a row.
ENGINES: dict[str, Callable[[GPT, Run, Kept], Engine]] = {
    "eager": EagerEngine,
    "packed": PackedEngine,
    "compiled": CompiledEngine,
    "graph": GraphEngine,
}
# What "auto" takes on a device type; "eager" on others.
BEST = {"cpu": "packed", "cuda": "graph"}


def engine_class(name: str, device_type: str) -> Callable[[GPT, Run, Kept], Engine]:
    """The engine of this name; "auto" is the best for the device type. ValueError lists the known ones."""
    if name == "auto":
        name = BEST.get(device_type, "eager")
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}: choose one of auto, {', '.join(ENGINES)} (--engine)")
    return ENGINES[name]
