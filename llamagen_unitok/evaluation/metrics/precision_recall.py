"""Improved precision and recall (arXiv 1904.06991): the share of samples among the real pictures, and the reverse."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llamagen_unitok.evaluation.features import FeatureSet

NEIGHBOURS = 3
BLOCK_ROWS = 4096
# Squared distances below this share of the squared lengths are rounding errors of float32 products: equal pictures.
_EQUAL = 2e-6


def precision_recall(samples: FeatureSet, reference: FeatureSet, device: torch.device) -> dict[str, float]:
    """precision and recall, in [0, 1], of all rows of both sets (ADM: 50,000 samples, 10,000 real pictures)."""
    precision, recall = manifold_shares(reference.pool_rows, samples.pool_rows, device)
    return {"precision": precision, "recall": recall}


def manifold_shares(
    real: np.ndarray, generated: np.ndarray, device: torch.device | str = "cpu", block: int = BLOCK_ROWS
) -> tuple[float, float]:
    """Shares of `generated` (N, E) in the manifold of `real` (M, E), and of `real` in that of `generated`.

    A manifold is the union of balls around its points, each as large as the distance to the third nearest other point
    (equation 1); a point on the edge is inside. Distances are float32 products in blocks, never N·M of them at once.
    ValueError for sets that have fewer than 4 points.
    """
    for name, rows in (("the reference", real), ("the samples", generated)):
        if len(rows) <= NEIGHBOURS:
            raise ValueError(
                f"precision and recall need more than {NEIGHBOURS} pictures on both sides, but {name} hold {len(rows)}"
            )
    # Distances stay; the products get small, and with them their rounding errors.
    centre = real.mean(axis=0, dtype=np.float64).astype(np.float32)
    real_rows, generated_rows = (torch.from_numpy(rows - centre) for rows in (real, generated))
    real_radii, generated_radii = (_radii(rows, device, block) for rows in (real_rows, generated_rows))
    generated_inside = torch.zeros(len(generated_rows), dtype=torch.bool)
    real_inside = torch.zeros(len(real_rows), dtype=torch.bool)
    for i in range(0, len(generated_rows), block):
        a = generated_rows[i : i + block].to(device)
        for j in range(0, len(real_rows), block):
            distances = _squared_distances(a, real_rows[j : j + block].to(device))
            generated_inside[i : i + block] |= (distances <= real_radii[j : j + block].to(device)).any(1).cpu()
            in_ball = distances <= generated_radii[i : i + block, None].to(device)
            real_inside[j : j + block] |= in_ball.any(0).cpu()
    return generated_inside.double().mean().item(), real_inside.double().mean().item()


def _radii(rows: Tensor, device: torch.device | str, block: int) -> Tensor:
    """Squared distance of each row to its third nearest other row, (N,)."""
    radii = torch.empty(len(rows))
    for i in range(0, len(rows), block):
        a = rows[i : i + block].to(device)
        nearest = torch.full((len(a), 0), torch.inf, device=device)
        for j in range(0, len(rows), block):
            distances = _squared_distances(a, rows[j : j + block].to(device))
            if i == j:
                distances.fill_diagonal_(torch.inf)  # not its own neighbour
            nearest = torch.cat([nearest, distances], dim=1)
            nearest = nearest.topk(min(NEIGHBOURS, nearest.shape[1]), dim=1, largest=False).values
        radii[i : i + block] = nearest.amax(dim=1).cpu()
    return radii


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) float32; 0 where rows are equal up to rounding."""
    lengths = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
    distances = torch.addmm(lengths, a, b.T, alpha=-2)
    return distances.masked_fill_(distances <= _EQUAL * lengths, 0)
