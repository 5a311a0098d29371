"""Inception Score (arXiv 1606.03498): how sure a classifier is of each picture, and how varied its answers are."""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import log_softmax

from llamagen_unitok.evaluation.features import FeatureSet

SPLITS = 10
# That of torch-fidelity, so that both put the same pictures into the same split.
SHUFFLE_SEED = 2020


def split_rows(count: int, splits: int = SPLITS) -> list[np.ndarray]:
    """Picture numbers of each split: a permutation that depends on `count` only, cut into equal parts."""
    order = np.random.RandomState(SHUFFLE_SEED).permutation(count)
    return [order[i * count // splits : (i + 1) * count // splits] for i in range(splits)]


def inception_score(samples: FeatureSet, reference: FeatureSet, device: torch.device) -> dict[str, float]:
    """exp E_x KL(p(y|x) ‖ p(y)) in each of ten splits: mean over the splits, and standard deviation (over 10, not 9).

    The splits are drawn over a fixed shuffle. Samples mostly come sorted by class, and splits in that order hold a
    tenth of the classes each, which makes the score too low. ValueError for fewer pictures than splits.
    """
    logits = samples.logit_rows
    if len(logits) < SPLITS:
        raise ValueError(f"an Inception Score over {SPLITS} splits needs at least {SPLITS} samples, not {len(logits)}")
    scores = []
    for rows in split_rows(len(logits)):
        log_p = log_softmax(logits[rows].astype(np.float64), axis=1)
        p = np.exp(log_p)
        mean = p.mean(axis=0)
        # a class that no picture has, to the last digit, adds 0
        log_mean = np.log(mean, out=np.zeros_like(mean), where=mean > 0)
        scores.append(np.exp((p * (log_p - log_mean)).sum(axis=1).mean()))
    return {"IS": float(np.mean(scores)), "IS_std": float(np.std(scores))}
