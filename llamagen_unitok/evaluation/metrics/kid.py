"""Kernel Inception Distance (arXiv 1801.01401): unbiased MMD² of features under a cubic kernel."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llamagen_unitok.evaluation.features import FeatureSet

SUBSETS = 100
SUBSET_ROWS = 1000
# That of torch-fidelity, so that both draw the same subsets.
SUBSET_SEED = 2020


def kid(samples: FeatureSet, reference: FeatureSet, device: torch.device) -> dict[str, float]:
    """Mean and standard deviation of MMD² over 100 pairs of subsets of 1,000 pictures, or of all where there are fewer.

    ValueError for sets of fewer than 2 pictures.
    """
    a, b = samples.pool_rows, reference.pool_rows
    rows = min(SUBSET_ROWS, len(a), len(b))
    random = np.random.RandomState(SUBSET_SEED)
    values = []
    for _ in range(SUBSETS):
        subsets = [one[random.choice(len(one), rows, replace=False)] for one in (a, b)]
        values.append(squared_mmd(*(torch.from_numpy(subset).to(device) for subset in subsets)))
    return {"KID": float(np.mean(values)), "KID_std": float(np.std(values))}


def squared_mmd(a: Tensor, b: Tensor) -> float:
    """Unbiased MMD² of rows a (n, E) and b (m, E) under k(x, y) = (x·y / E + 1)³; may be below 0.

    ValueError when one of them has fewer than 2 rows.
    """
    n, m = len(a), len(b)
    if min(n, m) < 2:
        raise ValueError(f"the kernel distance needs at least 2 pictures on both sides, not {n} and {m}")
    within_a, within_b = (((k := _kernel(rows, rows)).sum() - k.trace()).item() for rows in (a, b))
    return within_a / (n * (n - 1)) + within_b / (m * (m - 1)) - 2 * _kernel(a, b).mean().item()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    # Products in float32, whose errors cancel over a million of them; sums of these must not round.
    return ((a @ b.T).double() / a.shape[1] + 1) ** 3
