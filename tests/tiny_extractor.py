"""A network small enough for tests, and pictures for it: fixed random projections of a picture's pixels."""

from pathlib import Path

import numpy as np
from PIL import Image

from llamagen_unitok.evaluation.features import Features


class TinyExtractor:
    """pool (B, 6), spatial (B, 4), logits (B, 5), from the mean colours of a 2×2 grid. Its distance counts as FID."""

    name, frechet_name, width, weights_hash = "tiny", "FID", 6, "7" * 64
    spatial_width, has_logits = 4, True

    def __init__(self, weights=None, device="cpu", check_hash=True):
        self.projections = np.random.default_rng(0).standard_normal((12, 15)).astype(np.float32)
        self.seen = 0  # pictures

    def __call__(self, pixels):
        self.seen += len(pixels)
        count, height, width, _ = pixels.shape
        grid = pixels.reshape(count, 2, height // 2, 2, width // 2, 3).mean(axis=(2, 4), dtype=np.float32)
        values = grid.reshape(count, 12) / 32 @ self.projections
        return Features(values[:, :6], values[:, 6:10], values[:, 10:])


class NamelessExtractor(TinyExtractor):
    """The same, but not Inception's: no spatial features, and a name of its own."""

    name, frechet_name, spatial_width = "nameless", "FD-nameless", None

    def __call__(self, pixels):
        return super().__call__(pixels)._replace(spatial=None)


def pictures(count: int, seed: int = 0, size: int = 8) -> np.ndarray:
    """uint8 (count, size, size, 3): coarse colours, so that features differ."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    return coarse.repeat(size // 2, axis=1).repeat(size // 2, axis=2)


def write_folder(folder: Path, pixels: np.ndarray) -> Path:
    """Pictures (N, H, W, 3) as PNG files in subfolders of ten, named so that they sort as they are."""
    for i, one in enumerate(pixels):
        file = folder / f"{i // 10:03d}" / f"{i:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(one).save(file)
    return folder
