"""What samples are compared with: ADM's reference batches, any .npz of pictures, or a folder of them.

What a network sees in a reference is computed once and kept beside it, under a name that follows from the contents of
the reference and the weights of the network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llamagen_unitok.cache import cache_folder
from llamagen_unitok.evaluation.extractors import Extractor
from llamagen_unitok.evaluation.features import FeatureSet, collect_features
from llamagen_unitok.evaluation.gaussian import Gaussian
from llamagen_unitok.evaluation.images import ARRAY_NAME, ImageSource, open_images, size_text
from llamagen_unitok.evaluation.npz import ArrayStream, NpzReader, write_npz
from llamagen_unitok.evaluation.provenance import RECORD_NAME, as_array, code_version, command_line, read_record
from llamagen_unitok.runtime.distributed import World
from modelfolder import file_hash

# In arr_0 of ADM's batches, and so the real pictures of published precision and recall. More of a folder or a plain
# .npz would give figures that compare with none of them.
ADM_PICTURES = 10_000
_ADM_STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
_CACHE_VERSION = 2
_CHOICE_SEED = 0


class Reference:
    """Real pictures, or what is known of them. images: None for a file of statistics alone.

    Raises ValueError, in one line, when there is nothing to compare with.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.images: ImageSource | None = None
        self._reader: NpzReader | None = None
        self._read: dict[str, dict[str, Gaussian]] = {}
        if self.path.is_dir() or not self.path.exists():
            self.images = open_images(self.path)
            return
        self._reader = NpzReader(self.path)
        if not self._has_statistics or ARRAY_NAME in self._reader:
            self.images = open_images(self.path)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the file, or of the folder's pictures."""
        return self.images.content_hash if self.images else file_hash(self.path)

    def check(self, extractor: Extractor, needs: Collection[str], size: tuple[int, int]) -> None:
        """ValueError, in one line, unless samples of `size` (H, W) can be compared as `needs` (of NEEDS) says.

        Reads the file's own statistics, but no picture.
        """
        if self.images and self.images.size != size:
            raise ValueError(
                f"{self.path} has pictures of {size_text(self.images.size)} pixels, the samples of {size_text(size)}: "
                "compare pictures of one size"
            )
        missing = ", ".join(sorted(set(needs) - self.gives(extractor)))
        if missing and self.images:
            raise ValueError(f"{self.path} has mu and sigma, but no mu_s and sigma_s: it cannot give sFID")
        if missing:
            raise ValueError(f"{self.path} holds no pictures, only Inception statistics: it cannot give {missing}")

    def gives(self, extractor: Extractor) -> set[str]:
        """Which of NEEDS it has for this extractor: in the file, or from its pictures."""
        given = set(self._given(extractor))
        if self.images:
            given |= {"pool", "pool_rows"}
            # never FID of the file's statistics beside sFID of its few pictures
            if not self._given(extractor) and extractor.spatial_width is not None:
                given.add("spatial")
        return given

    @property
    def _has_statistics(self) -> bool:
        return self._reader is not None and all(name in self._reader for name in _ADM_STATISTICS["pool"])

    def features(
        self,
        extractor: Extractor,
        needs: Collection[str],
        *,
        batch_size: int,
        progress: bool = True,
        world: World | None = None,
    ) -> FeatureSet | None:
        """What `extractor` sees: statistics of ADM's layout for Inception, else from the cache, else of the pictures.

        needs: such as `check` accepts. None on all processes but the main one.
        """
        main = world is None or world.is_main
        given = self._given(extractor)
        if set(needs) <= set(given):
            return FeatureSet(self._counted, **given) if main else None
        found = self._cached(extractor) if main else None
        if not (world.any(found is not None) if world else found is not None):
            found = collect_features(
                self.images,
                extractor,
                ("pool", "spatial", "pool_rows"),
                required=set(needs) - set(given),
                batch_size=batch_size,
                keep=None if self._has_statistics else chosen_pictures(self.images.count, ADM_PICTURES),
                world=world,
                description="reference" if progress else None,
            )
            if main:
                self._keep(extractor, found)
        if not main:
            return None
        return FeatureSet(self._counted, **given, pool_rows=found.pool_rows) if given else found

    @cached_property
    def _record(self) -> dict[str, Any]:
        """How `make_reference` made the file; empty where it did not."""
        return read_record(self.path) or {}

    @property
    def _counted(self) -> int | None:
        """Pictures behind the file's statistics, where it says how many."""
        return self._record.get("pictures")

    def _given(self, extractor: Extractor) -> dict[str, Gaussian]:
        """The statistics in the file, when they are this extractor's. ValueError for such as it cannot have given."""
        key = f"{extractor.name} {extractor.weights_hash}"
        if key not in self._read:
            self._read[key] = self._read_statistics(extractor)
        return self._read[key]

    def _read_statistics(self, extractor: Extractor) -> dict[str, Gaussian]:
        if not self._has_statistics or extractor.frechet_name != "FID":
            return {}
        made_with = self._record.get("extractor", {}).get("weights_hash", extractor.weights_hash)
        if made_with != extractor.weights_hash:
            raise ValueError(
                f"{self.path} was made with other Inception weights ({made_with[:8]}…) than those in use "
                f"({extractor.weights_hash[:8]}…): make it again with --make-reference"
            )
        widths = {"pool": extractor.width, "spatial": extractor.spatial_width}
        given = {}
        for name, (mean_name, cov_name) in _ADM_STATISTICS.items():
            if mean_name in self._reader and cov_name in self._reader:
                found = [self._reader.read(n) for n in (mean_name, cov_name)]
                width = widths[name]
                if [one.shape for one in found] != [(width,), (width, width)] or not all(map(_is_finite, found)):
                    raise ValueError(
                        f"{self.path}: {mean_name} and {cov_name} are no finite mean and covariance of {width} features"
                    )
                given[name] = Gaussian(*(one.astype(np.float64) for one in found))
        return given

    def _cache_files(self, extractor: Extractor) -> list[Path]:
        """Where the features may be kept: beside the reference, else among the user's cached files."""
        key = f"{_CACHE_VERSION} {self.content_hash} {extractor.name} {extractor.weights_hash}"
        name = f"{self.path.resolve().name}.{extractor.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
        return [self.path.resolve().parent / name, cache_folder() / name]

    def _cached(self, extractor: Extractor) -> FeatureSet | None:
        for file in self._cache_files(extractor):
            # a damaged file is as good as none
            with suppress(ValueError, OSError):
                reader = NpzReader(file)
                mu, sigma, rows = (reader.read(name) for name in ("mu", "sigma", "pool_rows"))
                spatial = Gaussian(reader.read("mu_s"), reader.read("sigma_s")) if "mu_s" in reader else None
                return FeatureSet(int(reader.read("count")), Gaussian(mu, sigma), spatial, rows)
        return None

    def _keep(self, extractor: Extractor, features: FeatureSet) -> None:
        arrays = {"count": np.array(features.count), "pool_rows": features.pool_rows, **adm_statistics(features)}
        for file in self._cache_files(extractor):
            # one cannot always write beside the reference; without any cache it is only slower next time
            with suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                write_npz(file, arrays)
                return


def _is_finite(values: np.ndarray) -> bool:
    return values.dtype.kind in "fiu" and bool(np.isfinite(values).all())


def chosen_pictures(count: int, most: int) -> np.ndarray | None:
    """(count,) bool, true for `most` of the pictures, drawn with a fixed seed; None when there are no more of them."""
    if count <= most:
        return None
    chosen = np.zeros(count, dtype=bool)
    chosen[np.random.RandomState(_CHOICE_SEED).choice(count, most, replace=False)] = True
    return chosen


def adm_statistics(features: FeatureSet) -> dict[str, np.ndarray]:
    """mu, sigma and, where there are spatial features, mu_s and sigma_s."""
    arrays = {}
    for name, names in _ADM_STATISTICS.items():
        if getattr(features, name) is not None:
            arrays |= dict(zip(names, getattr(features, name), strict=True))
    return arrays


def make_reference(
    pictures: Path,
    out: Path,
    extractor: Extractor,
    *,
    batch_size: int,
    most: int = ADM_PICTURES,
    progress: bool = True,
    world: World | None = None,
) -> None:
    """Write a reference in ADM's layout: mu, sigma, mu_s and sigma_s of all pictures, and `most` of them in arr_0.

    Pictures are read as a stream, twice. Which weights made the statistics is recorded in it, under `record`.
    ValueError for another network than Inception, whose statistics this layout means.
    """
    if extractor.frechet_name != "FID":
        raise ValueError(f"a reference in ADM's layout holds Inception statistics, not those of {extractor.name}")
    source = open_images(pictures)
    description = "statistics" if progress else None
    features = collect_features(
        source,
        extractor,
        ("pool", "spatial"),
        required=("pool", "spatial"),
        batch_size=batch_size,
        world=world,
        description=description,
    )
    if features is None:
        return
    chosen = chosen_pictures(source.count, most)
    numbers = range(source.count) if chosen is None else np.flatnonzero(chosen).tolist()
    record = {
        "pictures": source.count,
        "content_hash": source.content_hash,
        "extractor": {"name": extractor.name, "weights_hash": extractor.weights_hash},
        "code_version": code_version(),
        "command": command_line(),
    }
    shape = (len(numbers), *source.size, 3)
    stream = ArrayStream(shape, np.dtype(np.uint8), source.chosen(numbers, batch_size))
    write_npz(out, {ARRAY_NAME: stream, **adm_statistics(features), RECORD_NAME: as_array(record)})
