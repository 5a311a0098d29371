"""Engines: ways to run one position of a generator. Decoding is the same loop over any of them."""

from __future__ import annotations

from collections.abc import Callable

from llamagen_unitok.gpt import GPT
from llamagen_unitok.sampling.graphs import CompiledEngine, GraphEngine
from llamagen_unitok.sampling.int8 import Int8Engine
from llamagen_unitok.sampling.kept import Kept
from llamagen_unitok.sampling.packed import PackedEngine
from llamagen_unitok.sampling.steps import EagerEngine, Engine, Run

# To add an engine, add a row.
ENGINES: dict[str, Callable[[GPT, Run, Kept], Engine]] = {
    "eager": EagerEngine,
    "packed": PackedEngine,
    "int8": Int8Engine,
    "compiled": CompiledEngine,
    "graph": GraphEngine,
}
CPU_ONLY = ("packed", "int8")
# What "auto" takes on a device type: for a few pictures, and where there are so many that compiling pays; "eager" on
# other devices.
BEST = {"cpu": ("packed", "packed"), "cuda": ("graph", "compiled")}


def engine_name(name: str, device_type: str, *, large_run: bool = False) -> str:
    """The name, or what "auto" stands for."""
    return BEST.get(device_type, ("eager", "eager"))[large_run] if name == "auto" else name


def engine_class(name: str, device_type: str) -> Callable[[GPT, Run, Kept], Engine]:
    """The engine of this name; "auto" is the best for a few pictures.

    ValueError lists the known ones, or says that the named one is for a CPU.
    """
    name = engine_name(name, device_type)
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}: choose one of auto, {', '.join(ENGINES)} (--engine)")
    if name in CPU_ONLY and device_type != "cpu":
        raise ValueError(f"--engine {name} runs on a CPU only, not on {device_type}: use auto")
    return ENGINES[name]
