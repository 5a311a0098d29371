"""Fréchet distance between Gaussians of features: FID (arXiv 1706.08500, equation 6) and sFID (arXiv 2103.03841)."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch

from llamagen_unitok.evaluation.features import FeatureSet
from llamagen_unitok.evaluation.gaussian import Gaussian


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁^½ Σ₂ Σ₁^½)^½, in float64, for covariances of any rank.

    The last trace is the sum of the singular values of Σ₁^½ Σ₂^½. Eigenvalues of the product would be their squares,
    and the root of a rounding error is far above a rounding error: with deficient ranks that spoils the usual tools.
    ValueError when the widths differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} numbers cannot be compared")
    step = a.mean - b.mean
    cross = scipy.linalg.svdvals(_root(a.cov).T @ _root(b.cov)).sum()
    return float(step @ step + np.trace(a.cov) + np.trace(b.cov) - 2 * cross)


def rank_warnings(name: str, width: int, counts: dict[str, int | None]) -> list[str]:
    """One sentence for each set of pictures that is too small for features of `width` numbers.

    counts: what the pictures are → how many; None where nobody knows.
    """
    return [
        f"{name} of {count:,} {what} is biased upwards: a covariance of {width:,} features has rank {count - 1:,} at "
        "most, so spread that both sets have is missing from it. Compare figures of equal counts only, and take 50,000 "
        "samples for a table"
        for what, count in counts.items()
        if count is not None and count <= width
    ]


def _root(cov: np.ndarray) -> np.ndarray:
    """F (E, r) with F Fᵀ = cov, of its rank r up to rounding, at least 1."""
    values, vectors = scipy.linalg.eigh(cov, driver="evd")
    real = values > values[-1] * len(values) * np.finfo(np.float64).eps
    real[-1] = True
    return vectors[:, real] * np.sqrt(np.maximum(values[real], 0))


def fid(samples: FeatureSet, reference: FeatureSet, device: torch.device) -> dict[str, float]:
    """Fréchet distance of the pooled features."""
    return {"FID": frechet_distance(samples.pool, reference.pool)}


def sfid(samples: FeatureSet, reference: FeatureSet, device: torch.device) -> dict[str, float]:
    """Fréchet distance of the features that keep their place in the picture."""
    return {"sFID": frechet_distance(samples.spatial, reference.spatial)}
