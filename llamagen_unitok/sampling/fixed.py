"""A position as one step whose shapes never change: the position lives on the device, so a step can be recorded once
as a CUDA graph and replayed (see graphs.py).

One step is a whole position: the trunk's step, K depth steps, guidance, draws, and the writing of the codes. Where
kernels.py runs, attention reads the cache up to the position, else up to one of `LENGTHS` lengths.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen_unitok.gpt import GPT
from llamagen_unitok.sampling.blocks import (
    BlockWeights,
    FixedWeights,
    LastWeights,
    enter,
    finish,
    leave,
    pass_on,
)
from llamagen_unitok.sampling.draws import Draw
from llamagen_unitok.sampling.kept import Kept
from llamagen_unitok.sampling.steps import Run

LENGTHS = 4  # of the cache, in equal parts of the sequence: attention reads an eighth more than it needs, on average

# Device types with kernels of their own, and the module that holds them.
KERNELS = {"cuda": "llamagen_unitok.sampling.kernels"}

_log = logging.getLogger(__name__)


@dataclass
class Buffers:
    """All that a step reads and writes besides the weights, at addresses that stay, with the graphs that hold on to
    these addresses: so no graph outlives the memory that it was recorded on.
    """

    weights: FixedWeights
    prefix: Tensor  # (rows, C), class embeddings, the null class's after the others
    scales: Tensor  # (L,) float32
    uniforms: Tensor  # (B, L, K) float32
    codes: Tensor  # (B, L, K) int64
    position: Tensor  # (1,) int64
    finite: Tensor  # () bool
    caches: Tensor  # (layers, rows, 2 kv, L, D), keys before values
    head_caches: Tensor  # (depth layers, rows, 2 kv, K, D)
    graphs: dict = field(default_factory=dict)  # settings of the draw → (rows, length) → recording
    compiled_rows: set[int] = field(default_factory=set)

    @classmethod
    def make(cls, gpt: GPT, weights: FixedWeights, batch: int, rows: int) -> Buffers:
        config, like = gpt.config, gpt.norm.weight
        shape = (batch, config.num_positions, config.num_codebooks)
        heads, width = 2 * config.kv_heads, config.head_width
        return cls(
            weights=weights,
            prefix=like.new_zeros(rows, config.width),
            scales=like.new_ones(config.num_positions, dtype=torch.float32),
            uniforms=like.new_zeros(shape, dtype=torch.float32),
            codes=like.new_zeros(shape, dtype=torch.int64),
            position=like.new_zeros(1, dtype=torch.int64),
            finite=like.new_ones((), dtype=torch.bool),
            caches=like.new_zeros(config.layers, rows, heads, config.num_positions, width),
            head_caches=like.new_zeros(config.depth_layers, rows, heads, config.num_codebooks, width),
        )

    def restart(self) -> None:
        self.position.zero_()
        self.finite.fill_(True)
        self.codes.zero_()


class FixedEngine:
    """The step run as it is: what `compiled` and `graph` are made of, on every device."""

    # What is around attention; a subclass compiles it.
    enter, pass_on, leave = staticmethod(enter), staticmethod(pass_on), staticmethod(leave)

    def __init__(self, gpt: GPT, run: Run, kept: Kept) -> None:
        self.run, self.config = run, gpt.config
        self.weights = kept.get("fixed weights", None, lambda: FixedWeights(gpt))
        self.buffers = kept.get(
            "buffers", (run.batch, run.rows), lambda: Buffers.make(gpt, self.weights, run.batch, run.rows)
        )
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
        self.kernels = self._working_kernels()
        self.buffers.restart()  # trying kernels leaves traces

    @property
    def codes(self) -> Tensor:
        return self.buffers.codes

    @property
    def finite(self) -> Tensor:
        return self.buffers.finite

    def length_at(self, p: int) -> int:
        """How much of the cache a step at position p may read: the shortest of a few lengths that holds it."""
        positions = self.config.num_positions
        if self.kernels is not None:
            return positions  # the kernel reads no more than it needs
        part = -(-positions // LENGTHS)
        return min(positions, (p // part + 1) * part)

    def seek(self, p: int) -> None:
        self.buffers.position.fill_(p)

    def position(self, p: int) -> None:
        self.step(self.run.rows_at(p), self.length_at(p))

    def step(self, rows: int, length: int) -> None:
        """One position, for the first `rows` sequences: reads and writes the buffers, and moves the position on.

        Nothing in it depends on a value that the host would have to know.
        """
        weights, buffers = self.weights, self.buffers
        here = buffers.position
        before = buffers.codes.index_select(1, (here - 1).clamp_min(0))[:, 0]  # (B, K)
        x = torch.where(here == 0, buffers.prefix[:rows], weights.embed(self._for_both(before, rows)))
        x = self._trunk(x, rows, length)
        codes = []
        for k in range(self.config.num_codebooks):
            if k:
                x = F.embedding(self._for_both(codes[-1], rows), weights.head_codes[k - 1])
            codes.append(self._choose(self._head(x, k), k))
        buffers.codes.index_copy_(1, here, torch.stack(codes, dim=-1)[:, None])
        here += 1

    def _trunk(self, x: Tensor, rows: int, length: int) -> Tensor:
        """Embeddings x (rows, C) → final-normed hidden states (rows, C)."""
        here, weights = self.buffers.position, self.weights
        turn = mask = None
        if self.kernels is None:
            turn = weights.turns.index_select(0, here)
            mask = weights.masks.index_select(0, here)[None, None, :, :length]

        def attend(qkv: Tensor, cache: Tensor, block: BlockWeights) -> Tensor:
            if self.kernels is not None:
                return self.kernels.attend(qkv, cache, here, block.heads, weights.table)
            cache.index_copy_(2, here, qkv[:, block.heads :].unsqueeze(2))
            return _attend(qkv[:, : block.heads], cache, block, mask)

        caches = self.buffers.caches[:, :rows, :, :length]
        return self._stack(x, weights.layers, weights.layers, caches, turn, attend, weights.last)

    def _head(self, x: Tensor, k: int) -> Tensor:
        """Logits (rows, V) of codebook k; x (rows, C) is the hidden state for k = 0, else code k - 1 embedded."""
        weights = self.weights
        layers = weights.head_layers
        if not layers:
            return finish(x, weights.head_last)

        def attend(qkv: Tensor, cache: Tensor, block: BlockWeights) -> Tensor:
            if self.kernels is not None:
                return self.kernels.attend(qkv, cache, weights.steps[k : k + 1], block.heads, None)
            new = qkv[:, -2 * block.kv_heads :]
            cache[:, :, k] = new
            # The first code sees only itself.
            return _attend(qkv[:, : block.heads], cache[:, :, : k + 1], block, None) if k else _values(new, block)

        entering = layers if k else weights.first_head_layers
        caches = self.buffers.head_caches[:, : len(x)]
        return self._stack(x, layers, entering, caches, None, attend, weights.head_last)

    def _stack(
        self,
        x: Tensor,
        layers: Sequence[BlockWeights],
        entering: Sequence[BlockWeights],
        caches: Tensor,
        turn: Tensor | None,
        attend: Callable[[Tensor, Tensor, BlockWeights], Tensor],
        last: LastWeights,
    ) -> Tensor:
        """x (rows, C) through blocks, whose attention is entered with the weights `entering`, and what is `last`."""
        qkv = self.enter(x, entering[0], turn)
        for number, (block, cache) in enumerate(zip(layers, caches, strict=True), start=1):
            y = attend(qkv, cache, block)
            if number < len(layers):
                x, qkv = self.pass_on(x, y, block, entering[number], turn)
        return self.leave(x, y, block, last)

    def _choose(self, logits: Tensor, k: int) -> Tensor:
        """Logits (rows, V) of codebook k → codes (B,)."""
        buffers, draw = self.buffers, self.chooser
        if self.kernels is not None and isinstance(draw, Draw):
            return self.kernels.guided_choice(
                logits, buffers.uniforms, buffers.scales, buffers.position, buffers.finite, k,
                draw.temperature, draw.top_k, draw.top_p,
            )  # fmt: skip
        guided = self._guide(logits.float())
        if k == 0:
            buffers.finite.logical_and_(guided.isfinite().all())
        return draw(guided, buffers.position, k)

    def _working_kernels(self) -> ModuleType | None:
        """kernels.py; None where this device or installation has none that run."""
        kind = self.codes.device.type
        kernels = _load(KERNELS[kind]) if kind in KERNELS else None
        if kernels is None or self.config.codebook_size > kernels.LARGEST_VOCABULARY:
            return None
        self.kernels = kernels
        try:  # a compiler may be missing on this machine, or not know this device
            hidden = self._trunk(torch.zeros_like(self.buffers.prefix), self.run.rows, self.length_at(0))
            logits = self._head(hidden, 0)
            if isinstance(self.chooser, Draw):
                self._choose(logits, 0)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            _log.warning("Triton's kernels do not run here (%s): slower ones do", type(error).__name__)
            KERNELS.pop(kind)
            return None
        return kernels

    def _guide(self, logits: Tensor) -> Tensor:
        batch = self.run.batch
        if len(logits) == batch:
            return logits
        conditional, unconditional = logits[:batch], logits[batch:]
        scale = self.buffers.scales.index_select(0, self.buffers.position)
        return torch.where(scale == 1, conditional, unconditional + scale * (conditional - unconditional))

    def _for_both(self, codes: Tensor, rows: int) -> Tensor:
        """Codes of B pictures, once more for the null class's half where that runs."""
        return codes if rows == len(codes) else torch.cat((codes, codes))


def _attend(q: Tensor, cache: Tensor, block: BlockWeights, mask: Tensor | None) -> Tensor:
    """q (rows, H, D) over keys and values (rows, 2 kv, length, D) → (rows, H·D); mask (1, 1, 1, length), added."""
    # Queries that share a head of keys are that head's query sequence: no kernel needs to know of groups.
    q = q.unflatten(1, (block.kv_heads, -1))
    keys, values = cache.split(block.kv_heads, dim=1)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).flatten(1)


def _values(new: Tensor, block: BlockWeights) -> Tensor:
    """Keys before values (rows, 2 kv, D) → the values that each head reads (rows, H·D)."""
    values, group = new[:, block.kv_heads :], block.heads // block.kv_heads
    return (values if group == 1 else values.repeat_interleave(group, dim=1)).flatten(1)


@functools.cache
def _load(name: str) -> ModuleType | None:
    """The module, or None without Triton."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
