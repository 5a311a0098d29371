"""Histograms of codes, one for each codebook, and what they say: usage, perplexity, and the distance of two of them."""

from __future__ import annotations

import numpy as np
from scipy.special import entr, rel_entr


def count_codes(codes: np.ndarray, codebook_size: int) -> np.ndarray:
    """codes (…, K) in [0, V) → how often each entry of each codebook occurs, (K, V) int64.

    Raises ValueError for codes outside [0, V).
    """
    flat = codes.reshape(-1, codes.shape[-1]).astype(np.int64)
    if flat.size and not (0 <= flat.min() and flat.max() < codebook_size):
        raise ValueError(f"codes from {flat.min()} to {flat.max()} do not fit codebooks of {codebook_size} entries")
    return np.stack([np.bincount(column, minlength=codebook_size) for column in flat.T])


def usage(counts: np.ndarray) -> np.ndarray:
    """counts (K, V) → share of entries that occur at all, (K,) in [0, 1]."""
    return (counts > 0).mean(axis=1)


def perplexity(counts: np.ndarray) -> np.ndarray:
    """counts (K, V) → exp of the entropy in nats of each histogram, (K,) in [1, V]; V when all entries are equal."""
    return np.exp(entr(_shares(counts)).sum(axis=1))


def jensen_shannon_bits(counts: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of two histograms (K, V), for each codebook: (K,) bits, 0 (equal) to 1 (disjoint)."""
    p, q = _shares(counts), _shares(other)
    middle = (p + q) / 2
    return np.maximum((rel_entr(p, middle) + rel_entr(q, middle)).sum(axis=1) / (2 * np.log(2)), 0)


def usage_figures(counts: np.ndarray) -> dict:
    """counts (K, V) → the figures of one set of codes as JSON: for each codebook, and their means."""
    used, spread = usage(counts), perplexity(counts)
    return {
        "codes_per_codebook": int(counts[0].sum()),
        "usage": used.tolist(),
        "usage_mean": float(used.mean()),
        "perplexity": spread.tolist(),
        "perplexity_mean": float(spread.mean()),
    }


def _shares(counts: np.ndarray) -> np.ndarray:
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
