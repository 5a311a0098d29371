"""What a network sees in pictures, collected in one stream: statistics, and rows where a figure needs them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from llamagen_unitok.evaluation.gaussian import Gaussian, GaussianStatistics
from llamagen_unitok.evaluation.images import ImageSource
from llamagen_unitok.runtime.distributed import World

# What a figure may need of a set of pictures: names of the fields of FeatureSet.
NEEDS = ("pool", "spatial", "pool_rows", "logit_rows")


class Features(NamedTuple):
    """A network's view of B pictures. pool: (B, E); spatial: (B, S) or None; logits: (B, C) or None; all float32."""

    pool: np.ndarray
    spatial: np.ndarray | None = None
    logits: np.ndarray | None = None


@dataclass(frozen=True)
class FeatureSet:
    """What was collected of a set of pictures; None is what was not asked for or what the network does not give.

    pool, spatial: mean and covariance; pool_rows: (N, E) float32; logit_rows: (N, C) float32, both in picture order.
    count: pictures behind the statistics, None where a file gave them and does not say.
    """

    count: int | None
    pool: Gaussian | None = None
    spatial: Gaussian | None = None
    pool_rows: np.ndarray | None = None
    logit_rows: np.ndarray | None = None


class _Collector:
    """The features of this process's pictures, `start` to before `stop` of the source."""

    def __init__(self, source: ImageSource, start: int, stop: int, needs: Collection[str], keep: np.ndarray | None):
        self.source, self.needs, self.keep = source, needs, keep
        self.next, self.rows = start, 0
        self.kept = stop - start if keep is None else int(keep[start:stop].sum())
        self.statistics: dict[str, GaussianStatistics] = {}
        self.arrays: dict[str, np.ndarray] = {}

    def add(self, features: Features) -> None:
        given = {"pool": features.pool, "spatial": features.spatial}
        given |= {"pool_rows": features.pool, "logit_rows": features.logits}
        count = len(features.pool)
        for name in self.needs:
            if given[name] is not None:
                check_finite(given[name], self.source.path, self.next)
        chosen = slice(None) if self.keep is None else self.keep[self.next : self.next + count]
        kept = len(features.pool[chosen])
        for name in self.needs:
            values = given[name]
            if values is None:
                continue
            if name in ("pool", "spatial"):
                self.statistics.setdefault(name, GaussianStatistics(values.shape[1])).update(values)
            else:
                array = self.arrays.setdefault(name, np.empty((self.kept, values.shape[1]), np.float32))
                array[self.rows : self.rows + kept] = values[chosen]
        self.next += count
        self.rows += kept


def check_finite(values: np.ndarray, source: object, first: int) -> None:
    """ValueError, in one line, for features (B, E) that are not finite; `first`: the number of their first picture."""
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{source}: the features of picture {first + bad[0]} are not finite (NaN or infinite): "
            "the extractor's weights are damaged, or its number type overflows"
        )


def collect_features(
    source: ImageSource,
    extract: Callable[[np.ndarray], Features],
    needs: Collection[str],
    *,
    batch_size: int,
    required: Collection[str] = (),
    keep: np.ndarray | None = None,
    world: World | None = None,
    description: str | None = None,
) -> FeatureSet | None:
    """The features of all pictures, each extracted once, by whichever process; None on all but the main one.

    needs: of NEEDS, collected where the network gives them; those in `required` must be given.
    keep: (N,) bool, the pictures whose rows are kept (all). Processes take whole batches, contiguous ones, so that the
    network sees the same batches whatever their number. description: of the progress bar; None shows none.
    Raises ValueError, in one line, for pictures that cannot be read, features that are not finite or not there.
    """
    batches = -(-source.count // batch_size)
    rank, size = (world.rank, world.size) if world else (0, 1)
    first, last = batches * rank // size, batches * (rank + 1) // size
    start, stop = first * batch_size, min(last * batch_size, source.count)
    collector = _Collector(source, start, stop, needs, keep)
    hidden = description is None or rank > 0
    with tqdm(total=stop - start, desc=description, unit="picture", disable=hidden, dynamic_ncols=True) as bar:
        for pixels in source.batches(batch_size, start, stop):
            features = extract(pixels)
            missing = [name for name in required if _absent(features, name)]
            if missing:
                kind = missing[0].partition("_")[0]
                raise ValueError(f"this extractor gives no {kind} features: choose other metrics")
            collector.add(features)
            bar.update(len(pixels))
    if size == 1:
        return _feature_set(source.count, collector.statistics, collector.arrays)
    return _gathered(source, collector, world)


def _absent(features: Features, name: str) -> bool:
    return {"spatial": features.spatial, "logit_rows": features.logits}.get(name, features.pool) is None


def _gathered(source: ImageSource, collector: _Collector, world: World) -> FeatureSet | None:
    """Merge what the processes collected, in the order of their shares; a process without pictures sends nothing."""
    statistics: dict[str, GaussianStatistics] = {}
    arrays: dict[str, np.ndarray] = {}
    for name in NEEDS:
        here = name in collector.statistics or name in collector.arrays
        if not world.any(here):
            continue
        if name in ("pool", "spatial"):
            own = collector.statistics.get(name, GaussianStatistics(0)).state()
            states = [world.gather(part) for part in own]
            for state in zip(*states, strict=True):
                if state[0][0]:
                    part = GaussianStatistics.from_state(*state)
                    statistics.setdefault(name, GaussianStatistics(part.width)).merge(part)
        else:
            parts = world.gather(collector.arrays.get(name, np.empty((0, 0), np.float32)))
            if world.is_main:
                arrays[name] = np.concatenate([part for part in parts if len(part)])
    return _feature_set(source.count, statistics, arrays) if world.is_main else None


def _feature_set(count: int, statistics: dict[str, GaussianStatistics], arrays: dict[str, np.ndarray]) -> FeatureSet:
    return FeatureSet(count, **{name: one.gaussian() for name, one in statistics.items()}, **arrays)
