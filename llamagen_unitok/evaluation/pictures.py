"""Real pictures as a stream: from a folder, with or without subfolders, or from an .npz; all of one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from llamagen_unitok.evaluation.npz import NpzReader
from tokenizer.images import adm_centre_crop, load_rgb

NPZ_ARRAY = "arr_0"


class PictureFolder:
    """All pictures in a folder and below it, in the order of their paths.

    Raises ValueError, naming the flag, when there are none.
    """

    def __init__(self, folder: Path, size: int, flag: str, workers: int) -> None:
        self.size, self.workers = size, workers
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
        if not self.paths:
            raise ValueError(f"{flag} {folder} holds no pictures ({', '.join(sorted(IMG_EXTENSIONS))})")
        self.names = [path.relative_to(folder).as_posix() for path in self.paths]

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[np.ndarray]:
        """The pictures of these indices, uint8 (B, size, size, 3); the next batch is read while one is used.

        Raises ValueError that names a file which is no readable picture.
        """
        rest = iter(indices)
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                ahead = self._submit(pool, rest, batch_size)
                while ahead:
                    batch, ahead = ahead, self._submit(pool, rest, batch_size)
                    yield np.stack([picture.result() for picture in batch])
            finally:
                pool.shutdown(cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, rest: Iterator[int], count: int) -> list[Future]:
        return [pool.submit(self._load, self.paths[index]) for index in islice(rest, count)]

    def _load(self, path: Path) -> np.ndarray:
        return np.asarray(adm_centre_crop(load_rgb(path), self.size))


class PictureArray:
    """The pictures of an .npz: its array `arr_0`, uint8 (N, H, W, 3).

    Raises ValueError, naming the flag and the file, when it holds something else or nothing.
    """

    def __init__(self, path: Path, size: int, flag: str) -> None:
        self.size, self.reader = size, NpzReader(path)
        if NPZ_ARRAY not in self.reader:
            raise ValueError(f"{flag} {path} has no array {NPZ_ARRAY!r}: it must hold uint8 pictures (N, H, W, 3)")
        shape, dtype = self.reader.shapes[NPZ_ARRAY], self.reader.dtypes[NPZ_ARRAY]
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
            raise ValueError(f"{flag} {path}: {NPZ_ARRAY} is {dtype} {shape}, it must hold uint8 pictures (N, H, W, 3)")
        self.names = [f"{NPZ_ARRAY}[{index}]" for index in range(shape[0])]

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[np.ndarray]:
        """The pictures of these indices, which must ascend: uint8 (B, size, size, 3). The file is read once through."""
        chosen = self._chosen(indices, batch_size)
        while batch := list(islice(chosen, batch_size)):
            yield np.stack(batch)

    def _chosen(self, indices: Sequence[int], rows: int) -> Iterator[np.ndarray]:
        wanted, start = iter(indices), 0
        index = next(wanted, None)
        for block in self.reader.batches(NPZ_ARRAY, rows):
            while index is not None and index < start + len(block):
                yield np.asarray(adm_centre_crop(Image.fromarray(block[index - start]), self.size))
                index = next(wanted, None)
            if index is None:
                return
            start += len(block)


def open_pictures(source: Path, size: int, *, flag: str, workers: int) -> PictureFolder | PictureArray:
    """A folder of pictures or an .npz, cropped to `size` when read; ValueError naming `flag` for anything else."""
    if source.is_dir():
        return PictureFolder(source, size, flag, workers)
    if source.suffix.lower() == ".npz":
        return PictureArray(source, size, flag)
    raise ValueError(f"{flag} {source} is neither a folder of pictures nor an .npz file")


def seeded_subset(count: int, limit: int | None, seed: int) -> np.ndarray:
    """Ascending indices of `limit` of `count` things, drawn without repetition from `seed`; all where limit is None."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, size=limit, replace=False))
