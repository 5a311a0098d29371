"""The step of fixed shape recorded as CUDA graphs, one for each number of rows and each length of the cache, and
replayed without a word from the host: as plain PyTorch runs it, or over compiled blocks, which run fewer kernels.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Protocol

import torch

from llamagen_unitok.gpt import GPT
from llamagen_unitok.sampling.blocks import enter, leave, pass_on
from llamagen_unitok.sampling.draws import Draw
from llamagen_unitok.sampling.fixed import FixedEngine
from llamagen_unitok.sampling.kept import Kept
from llamagen_unitok.sampling.steps import Run

WARM_UP_STEPS = 2  # before recording: libraries choose their kernels and allocate their workspaces
# Compilations of one function that a process may hold: each number of rows and each generator has its own, and
# torch's default would silently run the ninth uncompiled.
COMPILATIONS = 256

_log = logging.getLogger(__name__)


class Recording(Protocol):
    def replay(self) -> None: ...


class GraphEngine(FixedEngine):
    """The step recorded for every shape of the run before its first position; where no graphs are it runs as it is.

    Only the draws of `Draw` are recorded: another chooser may do on the host what a graph would leave out.
    """

    def __init__(self, gpt: GPT, run: Run, kept: Kept) -> None:
        super().__init__(gpt, run, kept)
        # The longest first: shorter ones then fit into its memory.
        shapes = sorted({(run.rows_at(p), self.length_at(p)) for p in range(len(run.scales))}, reverse=True)
        self.prepare(shapes)
        self.graphs: dict[tuple[int, int], Recording] = {}
        record = RECORDERS.get(run.labels.device.type)
        if record is None or not isinstance(run.chooser, Draw):
            return
        settings = (type(self), run.chooser.temperature, run.chooser.top_k, run.chooser.top_p)
        if settings not in self.buffers.graphs:
            self.buffers.graphs = {settings: {}}  # those of the last settings only: a sweep would pile them up
        self.graphs = self.buffers.graphs[settings]
        for shape in shapes:
            if shape not in self.graphs:
                self.graphs[shape] = self._record(record, shape)
        self.buffers.restart()  # recording leaves traces

    def prepare(self, shapes: list[tuple[int, int]]) -> None:
        """Called before the step first runs for these (rows, length)."""

    def position(self, p: int) -> None:
        if self.graphs:
            self.graphs[self.run.rows_at(p), self.length_at(p)].replay()
        else:
            super().position(p)

    def _record(self, record: Callable, shape: tuple[int, int]) -> Recording:
        def warm_up() -> None:
            for _ in range(WARM_UP_STEPS):
                self.buffers.restart()
                self.step(*shape)

        return record(warm_up, functools.partial(self.step, *shape), next(iter(self.graphs.values()), None))


def record_cuda_graph(
    warm_up: Callable[[], None], step: Callable[[], None], beside: torch.cuda.CUDAGraph | None
) -> torch.cuda.CUDAGraph:
    """What `step` does as a graph on the current device, in the memory of the graph `beside` it where there is one.

    Raises torch.OutOfMemoryError, after which the device and the current stream are as they were.
    """
    here = torch.cuda.current_stream()
    side = _side_stream(here.device)
    graph = torch.cuda.CUDAGraph()
    side.wait_stream(here)
    try:
        with torch.cuda.stream(side):
            warm_up()
        here.wait_stream(side)
        # Another thread may use the device meanwhile: decoding of pixels does.
        pool = None if beside is None else beside.pool()
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        # Ending a recording that lacked memory fails too, and would hide why.
        while error is not None and not isinstance(error, torch.OutOfMemoryError):
            error = error.__context__
        if error is not None:
            raise error from None
        raise
    finally:
        torch.cuda.set_stream(here)  # a recording that fails to end leaves its own behind
    return graph


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


# How a step is recorded on a device type: (warm_up, step, an earlier recording or None) → recording.
RECORDERS: dict[str, Callable[..., Recording]] = {"cuda": record_cuda_graph}


class CompiledEngine(GraphEngine):
    """The graph engine over compiled blocks; without a GPU, the compiled blocks run as they are.

    Compiling takes a minute, once a process and number of rows, and serves every layer, length and depth step. Where
    it fails, one line says so and the blocks run uncompiled.
    """

    def prepare(self, shapes: list[tuple[int, int]]) -> None:
        new = [shape for shape in shapes if shape[0] not in self.buffers.compiled_rows]
        if _Compiler.broken:
            return
        self.enter, self.pass_on, self.leave = map(_Compiler.compiled, (enter, pass_on, leave))
        try:
            with torch._dynamo.config.patch(recompile_limit=COMPILATIONS):
                for rows, length in {shape[0]: shape for shape in new}.values():
                    hidden = self._trunk(torch.zeros_like(self.buffers.prefix[:rows]), rows, length)
                    for k in range(self.config.num_codebooks):
                        self._head(hidden, k)
                    self.buffers.compiled_rows.add(rows)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a missing C compiler, an unknown GPU: anything that a compiler can stumble over
            _Compiler.broken = True
            self.enter, self.pass_on, self.leave = enter, pass_on, leave
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            _log.warning("torch.compile failed (%s: %s): blocks run uncompiled", type(error).__name__, reason)


class _Compiler:
    """One compiled form of each function for the whole process, and whether compiling ever failed."""

    broken = False

    @staticmethod
    @functools.cache
    def compiled(function: Callable) -> Callable:
        return torch.compile(function, dynamic=False)
