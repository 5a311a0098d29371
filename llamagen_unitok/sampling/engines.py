"""Engines: ways to run one position of a generator. Decoding is the same loop over any of them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from llamagen_unitok.gpt import GPT
from llamagen_unitok.sampling.building import BuildError
from llamagen_unitok.sampling.graphs import CompiledEngine, GraphEngine
from llamagen_unitok.sampling.kept import Kept
from llamagen_unitok.sampling.native import Int8Engine, NativeEngine, built
from llamagen_unitok.sampling.packed import PackedEngine
from llamagen_unitok.sampling.steps import EagerEngine, Engine, Run

# To add an engine, add a row.
ENGINES: dict[str, Callable[[GPT, Run, Kept], Engine]] = {
    "eager": EagerEngine,
    "packed": PackedEngine,
    "native": NativeEngine,
    "int8": Int8Engine,
    "compiled": CompiledEngine,
    "graph": GraphEngine,
}
CPU_ONLY = ("packed", "native", "int8")
# What "auto" takes on CUDA: for a few pictures, and where there are so many that compiling pays.
BEST_ON_CUDA = ("graph", "compiled")

_log = logging.getLogger(__name__)


def engine_name(name: str, device_type: str, *, large_run: bool = False) -> str:
    """The name, or what "auto" stands for: on a CPU that may build native code, which takes seconds, once."""
    if name != "auto":
        return name
    if device_type == "cpu":
        return _best_on_cpu()
    return BEST_ON_CUDA[large_run] if device_type == "cuda" else "eager"


@functools.cache
def _best_on_cpu() -> str:
    library = built()
    if isinstance(library, BuildError):
        _log.warning("%s: --engine packed, which is slower than native", library)
        return "packed"
    return "native"


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
