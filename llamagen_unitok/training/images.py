"""Pictures from a folder, for training a tokenizer and for extracting codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from tokenizer.images import load_rgb, to_unit

BICUBIC = v2.InterpolationMode.BICUBIC


def open_image_folder(folder: Path) -> ImageFolder:
    """torchvision's ImageFolder (one subfolder a class), pictures composed on white. ValueError if there are none."""
    if not folder.is_dir():
        raise ValueError(f"--images {folder} is not a folder: give one with a subfolder of pictures for each class")
    try:
        return ImageFolder(str(folder), loader=load_rgb)
    except (FileNotFoundError, RuntimeError):
        raise ValueError(f"--images {folder} has no pictures in subfolders: one subfolder for each class") from None


def centre_crop(size: int) -> Callable[[Image.Image], Image.Image]:
    """Shorter side to `size` pixels (bicubic), then the middle square; a picture of that size is left as it is."""
    return v2.Compose([v2.Resize(size, interpolation=BICUBIC), v2.CenterCrop(size)])


class TrainingPictures(Dataset):
    """(index, draw) → one float picture (3, H, W) in [-1, 1]: random resized crop and flip, seeded by the draw."""

    def __init__(self, folder: Path, size: int, *, crop_scale: float, flip: bool, seed: int):
        self.pictures = open_image_folder(folder)
        self.seed = seed
        crop = (
            v2.RandomResizedCrop(size, scale=(crop_scale, 1), interpolation=BICUBIC)
            if crop_scale < 1
            else centre_crop(size)
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


def ten_crop(size: int, enlarge: float = 1.1) -> Callable[[Image.Image], list[Image.Image]]:
    """The recipe's ten views: resize to `enlarge` × size, four corners and the middle, then these five mirrored."""
    return v2.Compose([v2.Resize(int(size * enlarge), interpolation=BICUBIC), v2.TenCrop(size)])


# How extraction turns one picture into its views: name → (names of the views, size → picture → views).
VIEWS: dict[str, tuple[list[str], Callable[[int], Callable[[Image.Image], list[Image.Image]]]]] = {
    "centre": (["centre"], lambda size: lambda picture: [centre_crop(size)(picture)]),
    "flip": (
        ["centre", "centre mirrored"],
        lambda size: lambda picture: [(crop := centre_crop(size)(picture)), ImageOps.mirror(crop)],
    ),
    "ten-crop": (
        [
            place + side
            for side in ("", " mirrored")
            for place in ("top left", "top right", "bottom left", "bottom right", "centre")
        ],
        ten_crop,
    ),
}


class PictureViews(Dataset):
    """index → (views (A, 3, H, W) in [-1, 1], label)."""

    def __init__(self, folder: Path, size: int, views: str):
        self.pictures = open_image_folder(folder)
        self.views = VIEWS[views][1](size)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = self.pictures[index]
        return torch.stack([to_unit(np.asarray(view)) for view in self.views(picture)]), label
