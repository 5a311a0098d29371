"""Training pictures from a folder, in an order that follows from the seed and the step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from llamagen_unitok.runtime.distributed import World
from tokenizer.images import load_rgb, to_unit


def open_image_folder(folder: Path) -> ImageFolder:
    """torchvision's ImageFolder (one subfolder a class), pictures composed on white. ValueError if there are none."""
    if not folder.is_dir():
        raise ValueError(f"--images {folder} is not a folder: give one with a subfolder of pictures for each class")
    try:
        return ImageFolder(str(folder), loader=load_rgb)
    except (FileNotFoundError, RuntimeError):
        raise ValueError(f"--images {folder} has no pictures in subfolders: one subfolder for each class") from None


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (index, draw) from a step on: epoch e is a permutation seeded by (seed, e), cut into global batches.

    `draw` numbers the picture's use in the whole run and seeds its augmentation. Each process takes its own part of
    each global batch, so what a step sees does not depend on the number of processes. The last pictures of an epoch
    that fill no batch go over into the next.
    """

    def __init__(self, length: int, global_batch: int, first_step: int, steps: int, seed: int, world: World):
        self.length, self.global_batch, self.seed, self.world = length, global_batch, seed, world
        self.first_step, self.steps = first_step, steps
        self.share = world.share(global_batch)
        self._epoch = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first_step, self.steps):
            first = step * self.global_batch + self.world.rank * self.share
            yield [(self.index_at(draw), draw) for draw in range(first, first + self.share)]

    def index_at(self, draw: int) -> int:
        """The index of the picture that is number `draw` of the whole run."""
        epoch, position = divmod(draw, self.length)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.length))
        return int(self._epoch[1][position])


class TrainingPictures(Dataset):
    """(index, draw) → one float picture (3, H, W) in [-1, 1]: random resized crop and flip, seeded by the draw."""

    def __init__(self, folder: Path, size: int, *, crop_scale: float, flip: bool, seed: int):
        self.pictures = open_image_folder(folder)
        self.size, self.seed = size, seed
        steps: list = []
        if crop_scale < 1:
            steps.append(v2.RandomResizedCrop(size, scale=(crop_scale, 1), interpolation=v2.InterpolationMode.BICUBIC))
        else:
            steps.append(v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC))
            steps.append(v2.CenterCrop(size))
        if flip:
            steps.append(v2.RandomHorizontalFlip())
        self.augment = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor]:
        index, draw = item
        path, _ = self.pictures.samples[index]
        # transforms draw from the global generators; the fork leaves the caller's as they were
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 0x9E3779B1 + draw)
            return (to_unit(np.asarray(self.augment(load_rgb(path)))),)


def picture_batches(
    dataset: TrainingPictures, *, global_batch: int, first_step: int, steps: int, seed: int, workers: int, world: World
) -> Iterator[tuple[Tensor, ...]]:
    """Batches (images (B, 3, H, W),) of this process, one for each step from `first_step` on."""
    sampler = StepSampler(len(dataset), global_batch, first_step, steps, seed, world)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=_quiet_worker if workers else None,
        prefetch_factor=4 if workers else None,
    )
    return iter(loader)


def _quiet_worker(_index: int) -> None:
    # Ctrl-C reaches the whole process group; the training process ends its workers after its last checkpoint.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
