"""Pictures to be judged: an .npz file or a folder, read as a stream of uint8 batches with flat memory."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from llamagen_unitok.evaluation.npz import NpzReader
from modelfolder import add_file, file_hash
from tokenizer.images import load_rgb

ARRAY_NAME = "arr_0"
_READERS = min(8, os.cpu_count() or 1)


class ImageSource(ABC):
    """Pictures of one size. count: how many; size: (H, W) in pixels."""

    path: Path
    count: int
    size: tuple[int, int]

    @abstractmethod
    def batches(self, rows: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """uint8 (rows, H, W, 3) from picture `start` to before `stop` (the end); the last batch may be short.

        ValueError for a picture that cannot be read or has another size, or a file that ends too early.
        """

    @cached_property
    @abstractmethod
    def content_hash(self) -> str:
        """SHA-256, in hexadecimal, of the file, or of the names and contents of a folder's pictures."""


class NpzImages(ImageSource):
    """The pictures of an .npz: its array `arr_0`, else its only array of pictures."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = NpzReader(path)
        self._array = _array_of_pictures(self._reader)
        self.count, *size, _ = self._reader.shapes[self._array]
        self.size = (size[0], size[1])

    def batches(self, rows: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        return self._reader.batches(self._array, rows, start, stop)

    @cached_property
    def content_hash(self) -> str:
        return file_hash(self.path)


class FolderImages(ImageSource):
    """All pictures in a folder and below it, in the order of their names; transparent parts on white."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in IMG_EXTENSIONS and not file.name.startswith(".") and file.is_file()
        )
        if not self.files:
            raise ValueError(f"{path} holds no pictures ({', '.join(IMG_EXTENSIONS)})")
        self.count = len(self.files)
        width, height = load_rgb(self.files[0]).size
        self.size = (height, width)

    def batches(self, rows: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        return self.chosen(list(range(self.count))[start:stop], rows)

    def chosen(self, numbers: list[int], rows: int) -> Iterator[np.ndarray]:
        """Like `batches`, of the pictures with these numbers."""
        with ThreadPoolExecutor(_READERS) as readers:
            for first in range(0, len(numbers), rows):
                yield np.stack(list(readers.map(self._read, numbers[first : first + rows])))

    def _read(self, number: int) -> np.ndarray:
        pixels = np.asarray(load_rgb(self.files[number]))
        if pixels.shape[:2] != self.size:
            raise ValueError(
                f"{self.files[number]} has {size_text(pixels.shape[:2])} pixels, but {self.files[0]} has "
                f"{size_text(self.size)}: make all pictures one size first"
            )
        return pixels

    @cached_property
    def content_hash(self) -> str:
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(file.relative_to(self.path).as_posix().encode() + b"\0")
            add_file(digest, file)
        return digest.hexdigest()


def open_images(path: str | Path) -> ImageSource:
    """The pictures of an .npz file or of a folder. ValueError, in one line, when there are none to be had."""
    path = Path(path)
    if path.is_dir():
        return FolderImages(path)
    if not path.exists():
        raise ValueError(f"{path} is not there: give an .npz file or a folder of pictures")
    return NpzImages(path)


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
