"""Engines: ways to run one step of a generator. Decoding is the same loop over any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from llamagen_unitok.gpt import GPT


class Engine(Protocol):
    """One run of decoding: owns the caches of `rows` sequences."""

    def begin(self, labels: Tensor) -> Tensor:
        """Labels (rows,) → hidden states (rows, C) that predict position 0."""

    def advance(self, codes: Tensor) -> Tensor:
        """The codes (rows, K) of the position just finished → hidden states (rows, C) that predict the next."""

    def head(self, hidden: Tensor, previous: Tensor | None) -> Tensor:
        """Logits (rows, V) of the next codebook; `previous` (rows,) is the code before it, None for the first."""

    def keep_rows(self, rows: int) -> None:
        """Go on with the first `rows` sequences only, from the next position."""


class EagerEngine:
    """Plain PyTorch, operation by operation: runs everywhere, and is what the others are compared with."""

    def __init__(self, gpt: GPT, rows: int) -> None:
        self.gpt = gpt
        self.cache = gpt.make_cache(rows)
        self.head_cache = gpt.output.make_cache(rows)

    def begin(self, labels: Tensor) -> Tensor:
        return self._trunk(self.gpt.cls_embedding(labels))

    def advance(self, codes: Tensor) -> Tensor:
        return self._trunk(self.gpt.tok_embeddings(codes))

    def head(self, hidden: Tensor, previous: Tensor | None) -> Tensor:
        return self.gpt.output.step(hidden, previous, self.head_cache)

    def keep_rows(self, rows: int) -> None:
        self.cache.keep_rows(rows)
        self.head_cache = self.gpt.output.make_cache(rows)

    def _trunk(self, x: Tensor) -> Tensor:
        return self.gpt.trunk(x.unsqueeze(1), self.cache).squeeze(1)


# Best first: "auto" takes the first.
ENGINES: dict[str, Callable[[GPT, int], Engine]] = {"eager": EagerEngine}


def make_engine(name: str, gpt: GPT, rows: int) -> Engine:
    """The engine of this name for `rows` sequences; "auto" is the best there is. ValueError lists the known ones."""
    if name == "auto":
        name = next(iter(ENGINES))
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}: choose one of auto, {', '.join(ENGINES)}")
    return ENGINES[name](gpt, rows)
