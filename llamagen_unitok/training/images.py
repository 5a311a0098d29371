"""Pictures as tensors: for training a tokenizer, and as the views that extraction encodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from llamagen_unitok.training.sources import PictureSource, open_image_folder
from tokenizer.images import adm_centre_crop, to_unit

BICUBIC = v2.InterpolationMode.BICUBIC
BATCHES_AHEAD = 2  # read while one is encoded


class TrainingPictures(Dataset):
    """(index, draw) → one float picture (3, H, W) in [-1, 1]: random resized crop and flip, seeded by the draw."""

    def __init__(self, folder: Path, size: int, *, crop_scale: float, flip: bool, seed: int):
        self.pictures = open_image_folder(folder)
        self.seed = seed
        crop = (
            v2.RandomResizedCrop(size, scale=(crop_scale, 1), interpolation=BICUBIC)
            if crop_scale < 1
            else partial(adm_centre_crop, size=size)
        )
        self.augment = v2.Compose([crop, v2.RandomHorizontalFlip()]) if flip else crop

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor]:
        index, draw = item
        picture, _ = self.pictures[index]
        # transforms draw from the global generator; the fork leaves the caller's as it was
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed << 40) + draw)
            return (to_unit(np.asarray(self.augment(picture))),)


def centre(picture: Image.Image, size: int) -> list[Image.Image]:
    """The ADM centre crop."""
    return [adm_centre_crop(picture, size)]


def centre_and_mirrored(picture: Image.Image, size: int) -> list[Image.Image]:
    """The ADM centre crop, and the same mirrored."""
    return [(crop := adm_centre_crop(picture, size)), ImageOps.mirror(crop)]


def ten_crop(picture: Image.Image, size: int, crop_range: float) -> list[Image.Image]:
    """LlamaGen's ten crops (arXiv 2406.06525): corners and middle of a larger square, then of its mirror image.

    The square is the ADM centre crop to the whole part of `crop_range` × `size`.
    """
    return list(v2.functional.ten_crop(adm_centre_crop(picture, int(crop_range * size)), [size, size]))


TEN_CROP_NAMES = [
    side + place
    for side in ("", "mirrored, ")
    for place in ("top left", "top right", "bottom left", "bottom right", "centre")
]


@dataclass(frozen=True)
class Views:
    """How extraction turns one picture into its A views. names: (A,) of the views; cut(picture, size) gives them."""

    names: list[str]
    cut: Callable[[Image.Image, int], list[Image.Image]]


def ten_crop_views(crop_ranges: Sequence[float]) -> Views:
    """Ten crops for each range; the published sets are 1.1 and, as a second one, 1.05."""
    return Views(
        [f"{crop_range:g}: {name}" for crop_range in crop_ranges for name in TEN_CROP_NAMES],
        lambda picture, size: [view for crop_range in crop_ranges for view in ten_crop(picture, size, crop_range)],
    )


# --views → crop ranges → views; only ten-crop has ranges.
VIEWS: dict[str, Callable[[Sequence[float]], Views]] = {
    "centre": lambda _: Views(["centre"], centre),
    "flip": lambda _: Views(["centre", "centre mirrored"], centre_and_mirrored),
    "ten-crop": ten_crop_views,
}


class Batch(NamedTuple):
    """rows: numbers of the pictures that could be read; views: theirs, uint8 (A, size, size, 3) each.

    unreadable: number of a picture → what is wrong with it, in one line.
    """

    rows: list[int]
    views: list[np.ndarray]
    unreadable: dict[int, str]


class PictureViews:
    """index → the views of a picture of `source`, uint8 (A, size, size, 3)."""

    def __init__(self, source: PictureSource, size: int, views: Views):
        self.source, self.size, self.views = source, size, views

    def __getitem__(self, index: int) -> np.ndarray:
        return np.stack([np.asarray(view) for view in self.views.cut(self.source.load(index), self.size)])

    def batches(self, rows: range, batch_size: int, threads: int) -> Iterator[Batch]:
        """Pictures in order; threads read the next batches meanwhile.

        Pillow decodes and resizes outside the interpreter lock.
        """
        rest = iter(rows)
        with ThreadPoolExecutor(threads) as pool:
            try:
                waiting: list[dict[int, Future]] = []
                while True:
                    while len(waiting) <= BATCHES_AHEAD and (indices := list(islice(rest, batch_size))):
                        waiting.append({index: pool.submit(self.__getitem__, index) for index in indices})
                    if not waiting:
                        return
                    batch = Batch([], [], {})
                    for index, views in waiting.pop(0).items():
                        try:
                            batch.views.append(views.result())
                            batch.rows.append(index)
                        except ValueError as error:
                            batch.unreadable[index] = str(error)
                    yield batch
            finally:
                pool.shutdown(cancel_futures=True)
