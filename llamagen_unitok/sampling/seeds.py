"""Noise as an argument: the uniforms of a picture follow from its seed and index alone."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

MAX_SEED = 2**64 - 1


def picture_uniforms(seed: int, indices: Iterable[int], num_positions: int, num_codebooks: int) -> Tensor:
    """Uniforms in [0, 1) for pictures `indices` of run `seed`: (B, L, K) float32, on the CPU.

    A counter-based generator (Philox) keyed by (seed, index), so no picture's noise depends on another's, on the
    batch, or on the number of processes.
    """
    rows = [
        np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64))).random(
            (num_positions, num_codebooks), dtype=np.float32
        )
        for index in indices
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, num_positions, num_codebooks)


def running_indices(labels: Iterable[int]) -> list[int]:
    """The number of each picture within its class: [5, 7, 5] → [0, 0, 1]."""
    seen: dict[int, int] = {}
    indices = []
    for label in labels:
        indices.append(seen.get(label, 0))
        seen[label] = indices[-1] + 1
    return indices
