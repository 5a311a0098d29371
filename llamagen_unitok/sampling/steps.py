"""One position of decoding in single steps, and the plain engine that every other is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llamagen_unitok.gpt import GPT
from llamagen_unitok.sampling.guidance import guide
from llamagen_unitok.sampling.kept import Kept

# Logits (B, V) at (position, codebook) → codes (B,). An engine that keeps its position on the device gives it as a
# tensor (1,) int64.
Chooser = Callable[[Tensor, "int | Tensor", int], Tensor]


@dataclass(frozen=True)
class Run:
    """What one batch is decoded from.

    labels: (B,) int64 on the device.   scales: the guidance scale at each position.   chooser: logits → codes.
    """

    labels: Tensor
    scales: Sequence[float]
    chooser: Chooser

    @property
    def batch(self) -> int:
        return self.labels.shape[0]

    @property
    def guided(self) -> int:
        """Positions from the first to the last whose scale is not 1; they run the null class beside the labels."""
        return max((p + 1 for p, scale in enumerate(self.scales) if scale != 1), default=0)

    @property
    def rows(self) -> int:
        """Sequences of the longest stretch: the labels, then as many of the null class where anything is guided."""
        return self.batch * (2 if self.guided else 1)

    def rows_at(self, position: int) -> int:
        return self.batch * (2 if position < self.guided else 1)


class Engine(Protocol):
    """Runs the positions of one batch.

    codes: (B, L, K) int64 on the device, written position by position.
    finite: scalar bool tensor, whether all logits of the first codebooks so far were finite.
    """

    codes: Tensor
    finite: Tensor

    def seek(self, p: int) -> None:
        """Make p the next position, whatever was the last: for timing some of them."""

    def position(self, p: int) -> None:
        """Trunk step, K depth steps, guidance and draw of position p, which follows p - 1 unless it was sought."""


class SteppedEngine:
    """An engine as two steps that a subclass gives: `trunk` and `head`."""

    def __init__(self, gpt: GPT, run: Run, kept: Kept) -> None:
        self.gpt, self.run = gpt, run
        shape = (run.batch, gpt.config.num_positions, gpt.config.num_codebooks)
        self.codes = torch.zeros(shape, dtype=torch.int64, device=run.labels.device)
        self.finite = torch.ones((), dtype=torch.bool, device=run.labels.device)

    def trunk(self, x: Tensor, p: int) -> Tensor:
        """The embedding x (rows, C) of what stands before position p → hidden states (rows, C) that predict p."""
        raise NotImplementedError

    def head(self, x: Tensor, k: int) -> Tensor:
        """Logits (rows, V) of codebook k; x (rows, C) is the hidden state for k = 0, else code k - 1 embedded."""
        raise NotImplementedError

    def seek(self, p: int) -> None:
        pass  # each call names its position

    def position(self, p: int) -> None:
        run, rows = self.run, self.run.rows_at(p)
        if p == 0:
            labels = run.labels
            if rows > run.batch:
                labels = torch.cat((labels, torch.full_like(labels, self.gpt.config.num_classes)))
            x = self.trunk(self.gpt.cls_embedding(labels), p)
        else:
            x = self.trunk(self._for_both(self.gpt.tok_embeddings(self.codes[:, p - 1]), rows), p)
        for k in range(self.gpt.config.num_codebooks):
            if k:
                x = self._for_both(self.gpt.output.embed(self.codes[:, p, k - 1], k), rows)
            logits = guide(self.head(x, k).float(), run.batch, run.scales[p])  # (B, V)
            if k == 0:
                self.finite &= logits.isfinite().all()
            self.codes[:, p, k] = run.chooser(logits, p, k)

    def _for_both(self, x: Tensor, rows: int) -> Tensor:
        return x if rows == len(x) else x.repeat(2, 1)


class EagerEngine(SteppedEngine):
    """Plain PyTorch, operation by operation: runs everywhere, and is what the others are compared with."""

    def __init__(self, gpt: GPT, run: Run, kept: Kept) -> None:
        super().__init__(gpt, run, kept)
        self.cache, self.head_cache = kept.get(
            "caches", run.rows, lambda: (gpt.make_cache(run.rows), gpt.output.make_cache(run.rows))
        )

    def trunk(self, x: Tensor, p: int) -> Tensor:
        self.cache.filled = p
        return self.gpt.trunk(x.unsqueeze(1), self.cache.first_rows(len(x))).squeeze(1)

    def head(self, x: Tensor, k: int) -> Tensor:
        cache = self.head_cache
        return self.gpt.output.step(x, k, None if cache is None else cache.first_rows(len(x)))
