"""The figures: one metric, one file, and the table of them. A new one is a file and a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from llamagen_unitok.evaluation.features import FeatureSet
from llamagen_unitok.evaluation.metrics.frechet import fid, sfid
from llamagen_unitok.evaluation.metrics.inception_score import SPLITS, inception_score
from llamagen_unitok.evaluation.metrics.kid import kid
from llamagen_unitok.evaluation.metrics.precision_recall import NEIGHBOURS, precision_recall


@dataclass(frozen=True)
class Metric:
    """How a figure is computed.

    compute: (samples, reference, device) → figures by name, in the order of `gives` (spreads end in _std).
    of_samples, of_reference: the fields of FeatureSet that it reads.   least: pictures that each of them must hold.
    """

    compute: Callable[[FeatureSet, FeatureSet, torch.device], dict[str, float]]
    gives: tuple[str, ...]
    of_samples: frozenset[str]
    of_reference: frozenset[str]
    least: int


def _metric(compute: Callable, gives: tuple[str, ...], needs: str, *, least: int = 2, compares: bool = True) -> Metric:
    return Metric(compute, gives, frozenset({needs}), frozenset({needs} if compares else ()), least)


# Names are those of Inception's figures; another network's get its name (figures.py).
METRICS: dict[str, Metric] = {
    "FID": _metric(fid, ("FID",), "pool"),
    "sFID": _metric(sfid, ("sFID",), "spatial"),
    "IS": _metric(inception_score, ("IS", "IS_std"), "logit_rows", least=SPLITS, compares=False),
    "precision-recall": _metric(precision_recall, ("precision", "recall"), "pool_rows", least=NEIGHBOURS + 1),
    "KID": _metric(kid, ("KID", "KID_std"), "pool_rows"),
}
