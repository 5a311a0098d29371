"""Arrays in .npz files, read and written as a stream: 50,000 pictures of 256×256 are 9.8 GB."""

from __future__ import annotations

import io
import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llamagen_unitok.runtime.files import replacing

_READ_BYTES = 1 << 22  # a zip member hands out at most this much at a time
# What zipfile, its decompressors and numpy's parser of headers raise for files that are damaged or not .npz.
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    tokenize.TokenError,
    struct.error,
    ValueError,
    TypeError,
    LookupError,
    SyntaxError,
    ArithmeticError,
    OSError,
    EOFError,
    RuntimeError,  # encrypted; NotImplementedError: a compression that is not known
    MemoryError,  # a length that no file has
)


@dataclass(frozen=True)
class ArrayStream:
    """An array that is written batch by batch. batches: arrays (n, *shape[1:]) whose lengths add up to shape[0]."""

    shape: tuple[int, ...]
    dtype: np.dtype
    batches: Iterable[np.ndarray]


def write_npz(path: Path, arrays: Mapping[str, np.ndarray | ArrayStream]) -> None:
    """Write an uncompressed .npz as numpy does, whole or not at all; a stream's batches are in memory one at a time.

    Equal arrays give equal bytes, however they were cut into batches and whenever they were written.
    Raises ValueError when the batches of a stream are not what it promised.
    """
    with replacing(path) as file:
        save_npz(file, arrays)


def save_npz(file: BinaryIO, arrays: Mapping[str, np.ndarray | ArrayStream]) -> None:
    """`write_npz` into an open binary file."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays.items():
            stream = array if isinstance(array, ArrayStream) else ArrayStream(array.shape, array.dtype, [array])
            entry = zipfile.ZipInfo(f"{name}.npy")  # its date is a constant
            with archive.open(entry, "w", force_zip64=True) as member:
                _write_npy(member, name, stream)


def _write_npy(member: BinaryIO, name: str, stream: ArrayStream) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(stream.dtype), "fortran_order": False, "shape": stream.shape}
    np.lib.format.write_array_header_1_0(member, header)
    rows = 0
    for batch in stream.batches:
        whole = batch.shape == stream.shape
        if batch.dtype != stream.dtype or not (whole or batch.shape[1:] == stream.shape[1:]):
            promised = f"{stream.dtype} {stream.shape}"
            raise ValueError(f"{name}: a batch is {batch.dtype} {batch.shape}, but the array {promised}")
        rows += batch.shape[0] if batch.ndim else 0
        member.write(np.ascontiguousarray(batch).tobytes())
    if stream.shape and rows != stream.shape[0]:
        raise ValueError(f"{name}: {rows} rows were given for an array of {stream.shape[0]}")


class NpzReader:
    """The arrays of an .npz file: shapes and dtypes at once, contents when asked for.

    Raises ValueError, naming the file, when it is no .npz file, is damaged, or holds an array of another length than
    its header says. Never unpickles.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        if not self.path.is_file():
            raise ValueError(f"{self.path} is not there")
        with self._explained(), zipfile.ZipFile(self.path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith(".npy"):
                    name = entry.filename.removesuffix(".npy")
                    with archive.open(entry) as member:
                        shape, dtype = _read_header(member)
                        expected = member.tell() + math.prod(shape) * dtype.itemsize
                    if expected != entry.file_size:
                        raise ValueError(f"{name} has {entry.file_size} bytes, not {expected}")
                    self.shapes[name], self.dtypes[name] = shape, dtype

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def read(self, name: str) -> np.ndarray:
        """The whole array."""
        shape = self._shape(name)
        batches = list(self.batches(name, max(1, shape[0]) if shape else 1))
        return np.concatenate(batches).reshape(shape) if batches else np.empty(shape, self.dtypes[name])

    def batches(self, name: str, rows: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """The array from row `start` to before row `stop` (its end), `rows` at a time; the last batch may be short."""
        shape, dtype = self._shape(name), self.dtypes[name]
        length = shape[0] if shape else 1
        left = (length if stop is None else min(stop, length)) - start
        row_shape = shape[1:]
        row_bytes = math.prod(row_shape) * dtype.itemsize
        with ExitStack() as opened:
            with self._explained():
                archive = opened.enter_context(zipfile.ZipFile(self.path))
                member = opened.enter_context(archive.open(f"{name}.npy"))
                _read_header(member)
                member.seek(start * row_bytes, io.SEEK_CUR)
            while left > 0:
                count = min(rows, left)
                with self._explained():
                    data = _read_exactly(member, count * row_bytes)
                # outside, so that errors of whoever takes the batches stay what they are
                yield np.frombuffer(data, dtype).reshape(count, *row_shape)
                left -= count

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            raise ValueError(f"{self.path} has no array {name!r}, only {', '.join(self.shapes) or 'nothing'}")
        return self.shapes[name]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except _UNREADABLE as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> ValueError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return ValueError(f"{self.path} cannot be read as an .npz file, it is damaged or cut short ({reason})")


def _read_header(member: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"an array has format {version}")
    shape, fortran_order, dtype = read[version](member)
    if fortran_order or dtype.hasobject:
        raise ValueError("an array is in Fortran order or holds Python objects")
    return shape, dtype


def _read_exactly(member: BinaryIO, count: int) -> bytearray:
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        got = member.readinto(view[done : done + _READ_BYTES])
        if not got:
            raise EOFError(f"it ends after {done} of {count} bytes")
        done += got
    return data
