"""What a picture shows, as a vector: EfficientNet-Lite0's features (evaluation/extractors.py) at unit length; and the
pictures to compare with. Needs the extra ``[eval]``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from demo.prepare_data import STYLES
from llamagen_unitok.evaluation.extractors import EfficientNetExtractor
from llamagen_unitok.evaluation.nearest import nearest_by_features, retrieved
from llamagen_unitok.runtime.files import replacing
from tokenizer.images import load_rgb

BATCH = 32


class Reference(NamedTuple):
    """The real pictures. features: (C, S, E) float32 of unit length, for C classes in S styles; paths: likewise."""

    features: Tensor
    paths: list[list[Path]]


class FeatureExtractor:
    """PIL pictures → features (N, 1280) float32 of unit length, so that a product is the cosine similarity."""

    def __init__(self) -> None:
        self._extract = EfficientNetExtractor()

    def __call__(self, pictures: Iterable[Image.Image]) -> Tensor:
        pictures, features = iter(pictures), []
        while batch := list(islice(pictures, BATCH)):
            pool = torch.from_numpy(self._extract([np.asarray(picture) for picture in batch]).pool)
            features.append(nn.functional.normalize(pool, dim=1))
        return torch.cat(features)


def training_pictures(data: Path, classes: int) -> list[list[Path]]:
    """Paths of the training pictures: one list a class, its styles in the order of STYLES. ValueError if one lacks."""
    paths = [[data / "train" / f"{label:04d}" / f"{style}.png" for style in STYLES] for label in range(classes)]
    for path in (path for styles in paths for path in styles):
        if not path.is_file():
            raise ValueError(f"{path} is missing: python demo/prepare_data.py makes the data")
    return paths


def load_reference(extract: FeatureExtractor, data: Path, classes: int, cache: Path) -> Reference:
    """Features of the training pictures; kept in the file `cache` until a picture changes."""
    paths = training_pictures(data, classes)
    digest = hashlib.sha256()
    for path in (path for styles in paths for path in styles):
        digest.update(path.read_bytes())
    if cache.is_file():
        with np.load(cache) as kept:
            if str(kept["digest"]) == digest.hexdigest():
                return Reference(torch.from_numpy(kept["features"]), paths)
    features = extract(_loaded(path for styles in paths for path in styles)).view(len(paths), len(STYLES), -1)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with replacing(cache) as file:
        np.savez(file, features=features.numpy(), digest=digest.hexdigest())
    return Reference(features, paths)


def _loaded(paths: Iterable[Path]) -> Iterator[Image.Image]:
    for path in tqdm(list(paths), desc="features of real pictures", unit="picture"):
        yield load_rgb(path)


def nearest(features: Tensor, reference: Reference, count: int = 1) -> Tensor:
    """Indices (N, count) into the real pictures, class by class and style by style, most alike first."""
    return nearest_by_features(features, reference.features.flatten(0, 1), count).rows


def recognised(features: Tensor, labels: Sequence[int], reference: Reference) -> Tensor:
    """(N,) bool: whether the nearest real picture, over all classes and styles, has the picture's own class."""
    classes, styles = reference.features.shape[:2]
    own = torch.arange(classes).repeat_interleave(styles)
    return retrieved(features, labels, reference.features.flatten(0, 1), own)


def style(features: Tensor, reference: Reference) -> Tensor:
    """(N,) int64: the style of the nearest real picture, over all classes."""
    return nearest(features, reference)[:, 0] % reference.features.shape[1]
