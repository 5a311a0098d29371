"""Engines whose step never changes shape: the position lives on the device, so a step can be compiled, or recorded
once as a CUDA graph and replayed.

One step is a whole position: the trunk's step, K depth steps, guidance, draws, and the writing of the codes. On a CUDA
device a graph is recorded for each number of rows and each length of the cache (attention reads whole lengths,
`LENGTHS` of them up to the full one), and replayed without a word from the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llamagen_unitok.gpt import GPT
from llamagen_unitok.layers import FixedLayerCache, KVCache
from llamagen_unitok.sampling.draws import Draw
from llamagen_unitok.sampling.kept import Kept
from llamagen_unitok.sampling.steps import Run

LENGTHS = 4  # of the cache, in equal parts of the sequence: attention reads an eighth more than it needs, on average
WARM_UP_STEPS = 2  # before recording: libraries choose their kernels and allocate their workspaces


@dataclass
class Buffers:
    """All that a step reads and writes besides the weights, at addresses that stay: a graph holds on to them."""

    prefix: Tensor  # (rows, C), class embeddings, the null class's after the others
    scales: Tensor  # (L,) float32
    uniforms: Tensor  # (B, L, K) float32
    codes: Tensor  # (B, L, K) int64
    position: Tensor  # (1,) int64
    finite: Tensor  # () bool
    cache: KVCache
    head_cache: KVCache | None

    @classmethod
    def make(cls, gpt: GPT, batch: int, rows: int) -> Buffers:
        config, like = gpt.config, gpt.norm.weight
        shape = (batch, config.num_positions, config.num_codebooks)
        return cls(
            prefix=like.new_zeros(rows, config.width),
            scales=like.new_ones(config.num_positions, dtype=torch.float32),
            uniforms=like.new_zeros(shape, dtype=torch.float32),
            codes=like.new_zeros(shape, dtype=torch.int64),
            position=like.new_zeros(1, dtype=torch.int64),
            finite=like.new_ones((), dtype=torch.bool),
            cache=gpt.make_cache(rows),
            head_cache=gpt.output.make_cache(rows),
        )

    def restart(self) -> None:
        self.position.zero_()
        self.finite.fill_(True)
        self.codes.zero_()


class FixedEngine:
    """The step run as it is: what `compiled` and `graph` are made of, on every device."""

    def __init__(self, gpt: GPT, run: Run, kept: Kept) -> None:
        self.gpt, self.run, self.kept = gpt, run, kept
        self.buffers = kept.get("buffers", (run.batch, run.rows), lambda: Buffers.make(gpt, run.batch, run.rows))
        labels = run.labels
        if run.rows > run.batch:
            labels = torch.cat((labels, torch.full_like(labels, gpt.config.num_classes)))
        self.buffers.prefix.copy_(gpt.cls_embedding(labels))
        scales = torch.ones(gpt.config.num_positions)
        scales[: len(run.scales)] = torch.tensor(run.scales)
        self.buffers.scales.copy_(scales)
        self.chooser = run.chooser
        if isinstance(run.chooser, Draw):
            self.buffers.uniforms.copy_(run.chooser.uniforms)
            self.chooser = run.chooser.over(self.buffers.uniforms)
        self.buffers.restart()
        self.blocks = [layer.forward for layer in gpt.layers]

    @property
    def codes(self) -> Tensor:
        return self.buffers.codes

    @property
    def finite(self) -> Tensor:
        return self.buffers.finite

    def length_at(self, p: int) -> int:
        """How much of the cache a step at position p reads: the shortest of a few lengths that holds it."""
        positions = self.gpt.config.num_positions
        part = -(-positions // LENGTHS)
        return min(positions, (p // part + 1) * part)

    def position(self, p: int) -> None:
        self.step(self.run.rows_at(p), self.length_at(p))

    def step(self, rows: int, length: int) -> None:
        """One position, for the first `rows` sequences: reads and writes the buffers, and moves the position on.

        Nothing in it depends on a value that the host would have to know.
        """
        gpt, buffers = self.gpt, self.buffers
        here = buffers.position
        before = buffers.codes.index_select(1, (here - 1).clamp_min(0))[:, 0]  # (B, K)
        x = torch.where(here == 0, buffers.prefix[:rows], self._for_both(gpt.tok_embeddings(before), rows))
        x = self._trunk(x, rows, length)
        codes = []
        for k in range(gpt.config.num_codebooks):
            if k:
                x = self._for_both(gpt.output.embed(codes[-1], k), rows)
            cache = None if buffers.head_cache is None else buffers.head_cache.first_rows(rows)
            logits = self._guide(gpt.output.step(x, k, cache).float())
            if k == 0:
                buffers.finite.logical_and_(logits.isfinite().all())
            codes.append(self.chooser(logits, here, k))
        buffers.codes.index_copy_(1, here, torch.stack(codes, dim=-1)[:, None])
        here += 1

    def _trunk(self, x: Tensor, rows: int, length: int) -> Tensor:
        cache, here = self.buffers.cache, self.buffers.position
        rope = self.gpt.rope.table.index_select(0, here)
        mask = torch.arange(length, device=here.device)[None] <= here
        x = x.unsqueeze(1)
        for block, keys, values in zip(self.blocks, cache.keys, cache.values, strict=True):
            x = block(x, rope, FixedLayerCache(keys[:rows, :, :length], values[:rows, :, :length], here, mask))
        return self.gpt.norm(x).squeeze(1)

    def _guide(self, logits: Tensor) -> Tensor:
        batch = self.run.batch
        if len(logits) == batch:
            return logits
        conditional, unconditional = logits[:batch], logits[batch:]
        scale = self.buffers.scales.index_select(0, self.buffers.position)
        return torch.where(scale == 1, conditional, unconditional + scale * (conditional - unconditional))

    def _for_both(self, x: Tensor, rows: int) -> Tensor:
        return x if rows == len(x) else x.repeat(2, 1)


class CompiledEngine(FixedEngine):
    """The step over compiled blocks: one is compiled and serves every layer of its kind (minutes, once a process)."""

    def __init__(self, gpt: GPT, run: Run, kept: Kept) -> None:
        super().__init__(gpt, run, kept)
        self.blocks = [_compiled(layer) for layer in gpt.layers]

    def length_at(self, p: int) -> int:
        return self.gpt.config.num_positions  # every other length would be compiled for itself


def _compiled(layer: torch.nn.Module):
    # Compiling the class's function, not each layer's: all layers share one result.
    compiled = _COMPILED.setdefault(type(layer), torch.compile(type(layer).forward, dynamic=False))
    return lambda *inputs: compiled(layer, *inputs)


_COMPILED: dict[type, object] = {}


class GraphEngine(FixedEngine):
    """The step recorded as CUDA graphs, one for each shape, when first needed; on other devices it runs as it is.

    Only the draws of `Draw` are recorded: another chooser may do on the host what a graph would leave out.
    """

    def __init__(self, gpt: GPT, run: Run, kept: Kept) -> None:
        super().__init__(gpt, run, kept)
        self.recorded = run.labels.device.type == "cuda" and isinstance(run.chooser, Draw)
        if not self.recorded:
            return
        settings = (run.chooser.temperature, run.chooser.top_k, run.chooser.top_p)
        self.graphs = kept.get("graphs", (run.batch, run.rows, settings), dict)
        shapes = {(run.rows_at(p), self.length_at(p)) for p in range(len(run.scales))}
        # Before the first position: recording waits for the device, and its steps leave traces that are wiped here.
        for shape in sorted(shapes - self.graphs.keys(), reverse=True):
            self.graphs[shape] = self._record(*shape)
        self.buffers.restart()

    def position(self, p: int) -> None:
        if self.recorded:
            self.graphs[self.run.rows_at(p), self.length_at(p)].replay()
        else:
            super().position(p)

    def _record(self, rows: int, length: int) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                self.buffers.restart()
                self.step(rows, length)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        with torch.cuda.graph(graph, pool=pool):
            self.step(rows, length)
        return graph
