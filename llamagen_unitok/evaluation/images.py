"""Pictures to be judged: an .npz file or a folder, read as a stream of uint8 batches with flat memory."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from llamagen_unitok.evaluation.npz import NpzReader
from modelfolder import add_file, file_hash
from tokenizer.images import adm_centre_crop, load_rgb

ARRAY_NAME = "arr_0"
READERS = min(8, os.cpu_count() or 1)


class ImageSource(ABC):
    """Pictures of one size. count: how many; size: (H, W) in pixels."""

    path: Path
    count: int
    size: tuple[int, int]

    def batches(self, rows: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """uint8 (rows, H, W, 3) from picture `start` to before `stop` (the end); the last batch may be short.

        ValueError for a picture that cannot be read or has another size, or a file that ends too early.
        """
        return self.chosen(range(self.count)[start:stop], rows)

    @abstractmethod
    def chosen(self, numbers: Sequence[int], rows: int) -> Iterator[np.ndarray]:
        """Like `batches`, of the pictures with these numbers, which must ascend."""

    @abstractmethod
    def name_of(self, number: int) -> str:
        """What to call a picture."""

    @cached_property
    @abstractmethod
    def content_hash(self) -> str:
        """SHA-256, in hexadecimal, of the file, or of the names and contents of a folder's pictures."""


class NpzImages(ImageSource):
    """The pictures of an .npz: its array `arr_0`, else its only array of pictures; with `crop`, each cropped to it."""

    def __init__(self, path: Path, crop: int | None = None) -> None:
        self.path, self._crop = path, crop
        self._reader = NpzReader(path)
        self._array = _array_of_pictures(self._reader)
        self.count, *size, _ = self._reader.shapes[self._array]
        self.size = (size[0], size[1]) if crop is None else (crop, crop)

    def batches(self, rows: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        return map(self._cropped, self._reader.batches(self._array, rows, start, stop))

    def chosen(self, numbers: Sequence[int], rows: int) -> Iterator[np.ndarray]:
        pictures = self._one_by_one(numbers, rows)
        while batch := list(islice(pictures, rows)):
            yield self._cropped(np.stack(batch))

    def _one_by_one(self, numbers: Sequence[int], rows: int) -> Iterator[np.ndarray]:
        """The file is read once through, up to the last one: seeking in a compressed one would start over each time."""
        first, wanted = 0, iter(numbers)
        number = next(wanted, None)
        for block in self._reader.batches(self._array, rows):
            while number is not None and number < first + len(block):
                yield block[number - first]
                number = next(wanted, None)
            if number is None:
                return
            first += len(block)

    def name_of(self, number: int) -> str:
        return f"{self._array}[{number}]"

    def _cropped(self, pixels: np.ndarray) -> np.ndarray:
        if pixels.shape[1:3] == self.size:
            return pixels
        return np.stack([np.asarray(adm_centre_crop(Image.fromarray(one), self.size[0])) for one in pixels])

    @cached_property
    def content_hash(self) -> str:
        return file_hash(self.path)


class FolderImages(ImageSource):
    """All pictures in a folder and below it, in the order of their names; transparent parts on white.

    Hidden files are no pictures. With `crop`, each is cropped to it; else all must have one size. readers: threads.
    """

    def __init__(self, path: Path, crop: int | None = None, readers: int = READERS) -> None:
        self.path, self._crop, self._readers = path, crop, readers
        self.files = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in IMG_EXTENSIONS and not file.name.startswith(".") and file.is_file()
        )
        if not self.files:
            raise ValueError(f"{path} holds no pictures ({', '.join(IMG_EXTENSIONS)})")
        self.count = len(self.files)
        if crop is None:
            width, height = load_rgb(self.files[0]).size
            self.size = (height, width)
        else:
            self.size = (crop, crop)

    def chosen(self, numbers: Sequence[int], rows: int) -> Iterator[np.ndarray]:
        """The next batch is read while one is used."""
        rest = iter(numbers)
        with ThreadPoolExecutor(self._readers) as pool:
            try:
                ahead = self._submit(pool, rest, rows)
                while ahead:
                    batch, ahead = ahead, self._submit(pool, rest, rows)
                    yield np.stack([picture.result() for picture in batch])
            finally:
                pool.shutdown(cancel_futures=True)

    def name_of(self, number: int) -> str:
        return self.files[number].relative_to(self.path).as_posix()

    def _submit(self, pool: ThreadPoolExecutor, rest: Iterator[int], count: int) -> list[Future]:
        return [pool.submit(self._read, number) for number in islice(rest, count)]

    def _read(self, number: int) -> np.ndarray:
        picture = load_rgb(self.files[number])
        if self._crop is not None:
            return np.asarray(adm_centre_crop(picture, self._crop))
        pixels = np.asarray(picture)
        if pixels.shape[:2] != self.size:
            raise ValueError(
                f"{self.files[number]} has {size_text(pixels.shape[:2])} pixels, but {self.files[0]} has "
                f"{size_text(self.size)}: make all pictures one size first"
            )
        return pixels

    @cached_property
    def content_hash(self) -> str:
        digest = hashlib.sha256()
        for number, file in enumerate(self.files):
            digest.update(self.name_of(number).encode() + b"\0")
            add_file(digest, file)
        return digest.hexdigest()


def open_images(path: str | Path, *, crop: int | None = None, readers: int = READERS) -> ImageSource:
    """The pictures of an .npz file or of a folder. ValueError, in one line, when there are none to be had.

    crop: side of ADM's centre crop, which every picture is given; None leaves them as they are.
    readers: threads that read a folder.
    """
    path = Path(path)
    if path.is_dir():
        return FolderImages(path, crop, readers)
    if not path.exists():
        raise ValueError(f"{path} is not there: give an .npz file or a folder of pictures")
    return NpzImages(path, crop)


def seeded_subset(count: int, limit: int | None, seed: int) -> np.ndarray:
    """Ascending indices of `limit` of `count` things, drawn without repetition from `seed`; all where limit is None."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, size=limit, replace=False))


def size_text(size: tuple[int, ...]) -> str:
    """(H, W) as W×H."""
    return f"{size[1]}×{size[0]}"


def _array_of_pictures(reader: NpzReader) -> str:
    def are_pictures(name: str) -> bool:
        shape = reader.shapes[name]
        return reader.dtypes[name] == np.uint8 and len(shape) == 4 and shape[-1] == 3 and 0 not in shape

    if ARRAY_NAME in reader:
        if are_pictures(ARRAY_NAME):
            return ARRAY_NAME
        found = f"{ARRAY_NAME} is {reader.dtypes[ARRAY_NAME]} {reader.shapes[ARRAY_NAME]}"
    else:
        names = [name for name in reader.shapes if are_pictures(name)]
        if len(names) == 1:
            return names[0]
        found = f"it has {'several' if names else 'none'} ({', '.join(reader.shapes) or 'no arrays at all'})"
    raise ValueError(f"{reader.path}: pictures are one array uint8 (N, height, width, 3), but {found}")
