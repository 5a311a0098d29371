"""Where labelled pictures come from: a folder, tar shards (webdataset layout) or parquet files, with random access.

To add a source, write a class with the methods of `PictureSource` and a row of `SOURCES`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from llamagen_unitok.runtime.distributed import World
from llamagen_unitok.runtime.files import replacing
from tokenizer.images import load_rgb

CACHED_ROW_GROUPS = 2  # of a parquet file, held by a process: the one being read, and its neighbour


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source. index: a folder that keeps what finding the pictures took long to learn."""

    image_column: str = "image"
    label_column: str = "label"
    index: Path | None = None


class PictureSource(Protocol):
    """N labelled pictures in a fixed order.

    labels: (N,) int64, read without decoding a picture.   class_names: by label, or None where the files hold none.
    sizes: (N,) int64, bytes of each picture's file, or of what holds it where its own are not known.
    """

    labels: np.ndarray
    sizes: np.ndarray
    class_names: list[str] | None

    def name(self, index: int) -> str:
        """Where a picture is, for a reader of an error message."""

    def load(self, index: int) -> Image.Image:
        """A picture as RGB, on white. ValueError, in one line that names it, when it cannot be read."""


class FolderSource:
    """One subfolder of pictures for each class; labels count the sorted subfolders."""

    def __init__(self, images: Path, files: list[Path], options: SourceOptions, world: World):
        folder = open_image_folder(images)
        self.class_names: list[str] | None = folder.classes
        self.labels = np.array(folder.targets, dtype=np.int64)
        self._samples = folder.samples
        self.sizes = np.array([os.stat(path).st_size for path, _ in folder.samples], dtype=np.int64)

    def name(self, index: int) -> str:
        return self._samples[index][0]

    def load(self, index: int) -> Image.Image:
        return load_rgb(self.name(index))


def open_image_folder(folder: Path) -> ImageFolder:
    """torchvision's ImageFolder (one subfolder a class), pictures composed on white. ValueError if there are none."""
    if not folder.is_dir():
        raise ValueError(f"--images {folder} is not a folder: give one with a subfolder of pictures for each class")
    try:
        return ImageFolder(str(folder), loader=load_rgb)
    except (FileNotFoundError, RuntimeError):
        raise ValueError(f"--images {folder} has no pictures in subfolders: one subfolder for each class") from None


class TarSource:
    """Uncompressed tar files in webdataset layout: ``key.jpg`` (or another picture) beside ``key.cls`` or ``key.json``.

    The label is the number in the .cls file, else the entry of the .json that `label_column` names. The headers of all
    files are read once, shared out over the processes and kept under `index`; a picture is then one read at its offset.
    """

    class_names = None

    def __init__(self, images: Path, files: list[Path], options: SourceOptions, world: World):
        self._files = files
        tables = [_kept_path(options.index, path, options.label_column) for path in files]
        mine = range(world.rank, len(files), world.size) if options.index else range(len(files))
        made: dict[int, np.ndarray] = {}

        def read_headers() -> None:
            for i in tqdm(mine, desc="reading tar headers", unit="tar", disable=not world.is_main or len(files) < 2):
                table = tables[i]
                if table is None:
                    made[i] = index_tar(files[i], options.label_column)
                elif not table.exists():
                    table.parent.mkdir(parents=True, exist_ok=True)
                    with replacing(table) as file:
                        np.save(file, index_tar(files[i], options.label_column), allow_pickle=False)

        world.together(read_headers)
        parts = [made[i] if t is None else np.load(t, allow_pickle=False) for i, t in enumerate(tables)]
        self._starts = np.cumsum([0, *map(len, parts)])
        self._members, self._offsets, self.sizes, self.labels = (
            np.concatenate([part[field] for part in parts]) for field in ("member", "offset", "size", "label")
        )

    def name(self, index: int) -> str:
        return f"{self._file(index)}:{self._members[index].decode(errors='replace')}"

    def load(self, index: int) -> Image.Image:
        with open(self._file(index), "rb") as file:
            file.seek(self._offsets[index])
            data = file.read(self.sizes[index])
        return load_rgb(io.BytesIO(data), name=self.name(index))

    def _file(self, index: int) -> Path:
        return self._files[np.searchsorted(self._starts, index, side="right") - 1]


def index_tar(path: Path, label_key: str) -> np.ndarray:
    """The pictures of a tar file in its order: a structured array of member (bytes), offset, size and label.

    Raises ValueError, in one line, for a file that is damaged, cut short or compressed, and for pictures without label.
    """
    rows = []
    length = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for key, members in groupby(_regular_members(tar), key=lambda member: _key_and_ending(member.name)[0]):
                picture, label = None, None
                for member in members:
                    ending = _key_and_ending(member.name)[1]
                    if member.offset_data + member.size > length:
                        raise ValueError(f"{path} is cut short in {member.name}: copy or make it again")
                    if f".{ending}" in IMG_EXTENSIONS:
                        if picture is not None:
                            raise ValueError(
                                f"{path} has two pictures of key {key!r}, {picture.name} and {member.name}"
                            )
                        picture = member
                    elif ending == "cls":
                        label = _label(tar.extractfile(member).read(), f"{path}:{member.name}")
                    elif ending == "json" and label is None:
                        label = _json_label(tar.extractfile(member).read(), label_key, f"{path}:{member.name}")
                if picture is not None and label is None:
                    raise ValueError(
                        f"{path} has no label for {picture.name}: right beside it belongs {key}.cls with a number, or "
                        f"{key}.json with {label_key!r} (--label-column)"
                    )
                if picture is not None:
                    rows.append((picture.name.encode(), picture.offset_data, picture.size, label))
                tar.members.clear()  # a header of each would stay in memory
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no sound uncompressed tar file ({error}): unpack it, or make it again") from None
    if not rows:
        raise ValueError(f"{path} has no pictures ({', '.join(sorted(IMG_EXTENSIONS))})")
    width = max(len(row[0]) for row in rows)
    return np.array(rows, [("member", f"S{width}"), ("offset", "i8"), ("size", "i8"), ("label", "i8")])


def _regular_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        if member.isfile():
            yield member


def _key_and_ending(member: str) -> tuple[str, str]:
    """webdataset's split at the first dot of the file name: ``a.b/c.x.jpg`` → ``a.b/c`` and ``x.jpg``."""
    folder, slash, name = member.rpartition("/")
    key, _, ending = name.partition(".")
    return folder + slash + key, ending.lower()


def _label(text: bytes, where: str) -> int:
    if not re.fullmatch(rb"\s*[0-9]{1,18}\s*", text):
        raise ValueError(f"{where} must hold the number of a class, not {text[:40].decode(errors='replace')!r}")
    return int(text)


def _json_label(text: bytes, key: str, where: str) -> int | None:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    label = values.get(key) if isinstance(values, dict) else None
    if label is not None and (isinstance(label, bool) or not isinstance(label, int) or label < 0):
        raise ValueError(f"{where} must hold the number of a class under {key!r}, not {label!r}")
    return label


def _kept_path(index: Path | None, path: Path, label_key: str) -> Path | None:
    """Where the headers of a tar file are kept: another name as soon as the file is another."""
    if index is None:
        return None
    state = path.stat()
    digest = hashlib.sha256(repr((str(path.resolve()), state.st_size, state.st_mtime_ns, label_key)).encode())
    return index / f"{path.stem}-{digest.hexdigest()[:16]}.npy"


class ParquetSource:
    """Parquet files with a column of encoded pictures, as the hub's data sets have it, and a column of labels.

    A picture is bytes, or a struct with ``bytes`` (or a ``path`` beside the file). Labels are whole numbers, named by
    the ClassLabel feature where the file has one, or strings, which count in sorted order. Needs pyarrow.
    """

    def __init__(self, images: Path, files: list[Path], options: SourceOptions, world: World):
        self._arrow, parquet = _pyarrow()
        self._files, self._column = files, options.image_column
        self.class_names: list[str] | None = None
        self._groups: list[tuple[int, int]] = []  # (file, row group)
        sizes, group_bytes, labels = [], [], []
        for i, path in enumerate(tqdm(files, desc="reading labels", unit="file", disable=not world.is_main)):
            try:
                file = parquet.ParquetFile(path)
                for column in (options.image_column, options.label_column):
                    if column not in file.schema_arrow.names:
                        names = ", ".join(file.schema_arrow.names)
                        flag = "--image-column" if column == options.image_column else "--label-column"
                        raise ValueError(f"{path} has no column {column!r} but {names}: give {flag}")
                labels += file.read(columns=[options.label_column])[options.label_column].to_pylist()
            except (self._arrow.ArrowException, OSError) as error:
                raise ValueError(f"{path} is no sound parquet file ({error}): copy or make it again") from None
            self._groups += [(i, group) for group in range(file.num_row_groups)]
            sizes += [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            group_bytes += [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
            self.class_names = self.class_names or _class_label_names(file.schema_arrow, options.label_column)
        self._starts = np.cumsum([0, *sizes])
        self.sizes = np.repeat(np.array(group_bytes, dtype=np.int64), sizes)
        if not labels:
            raise ValueError(f"--images {images} has no pictures: its parquet files have no rows")
        if all(isinstance(label, str) for label in labels):
            names, self.labels = np.unique(labels, return_inverse=True)
            self.class_names = names.tolist()
        elif all(isinstance(label, int) and not isinstance(label, bool) and label >= 0 for label in labels):
            self.labels = np.array(labels, dtype=np.int64)
        else:
            raise ValueError(f"--images {images}: column {options.label_column!r} must hold a class for every picture")
        self._lock, self._cached = threading.Lock(), {}

    def name(self, index: int) -> str:
        group = self._group(index)
        file, number = self._groups[group]
        return f"{self._files[file]}, row group {number}, row {index - self._starts[group]}"

    def load(self, index: int) -> Image.Image:
        group = self._group(index)
        value = self._rows(group)[int(index - self._starts[group])].as_py()
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                return load_rgb(self._files[self._groups[group][0]].parent / value["path"])
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise ValueError(f"{self.name(index)}: column {self._column!r} holds no picture but {type(value).__name__}")
        return load_rgb(io.BytesIO(value), name=self.name(index))

    def _group(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _rows(self, group: int) -> Any:
        """The picture column of a row group; neighbours share one read, whichever thread comes first."""
        with self._lock:
            if group not in self._cached:
                while len(self._cached) >= CACHED_ROW_GROUPS:
                    self._cached.pop(next(iter(self._cached)))
                file, number = self._groups[group]
                try:
                    table = _pyarrow()[1].ParquetFile(self._files[file]).read_row_group(number, columns=[self._column])
                except (self._arrow.ArrowException, OSError) as error:
                    raise ValueError(
                        f"{self._files[file]}, row group {number}, cannot be read ({error}): copy or make it again"
                    ) from None
                self._cached[group] = table[self._column]
            return self._cached[group]


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("parquet files need pyarrow: pip install 'llamagen-unitok[extract]'") from None
    return pyarrow, pyarrow.parquet


def _class_label_names(schema: Any, column: str) -> list[str] | None:
    """The names of a ClassLabel feature, which the hub's `datasets` library writes into the schema."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return list(feature["names"])
    except (KeyError, TypeError, ValueError):
        return None


@dataclass(frozen=True)
class SourceKind:
    """A row of the table. ending: of its files; None takes a folder that holds no files of the other rows."""

    ending: str | None
    open: Callable[[Path, list[Path], SourceOptions, World], PictureSource]


SOURCES = {
    "tar": SourceKind(".tar", TarSource),
    "parquet": SourceKind(".parquet", ParquetSource),
    "folder": SourceKind(None, FolderSource),
}


def open_source(images: Path, options: SourceOptions, world: World) -> PictureSource:
    """The source that --images means: a folder with a subfolder for each class, or tar or parquet files.

    Files are given as a folder of them, one by name, or a range of numbers such as ``train-{0000..0145}.tar``.
    Every process of `world` must call this. Raises ValueError, in one line, when that is none of these.
    """
    named = expand_ranges(str(images))
    for kind in SOURCES.values():
        if kind.ending is None:
            return kind.open(images, [], options, world)
        files = sorted(images.glob(f"*{kind.ending}")) if images.is_dir() else [Path(name) for name in named]
        if files and all(file.name.endswith(kind.ending) for file in files):
            missing = [file for file in files if not file.is_file()]
            if missing:
                raise ValueError(f"--images {images}: {missing[0]} is missing ({len(missing)} of {len(files)} files)")
            return kind.open(images, files, options, world)
    raise AssertionError("the last row takes everything")


def expand_ranges(text: str) -> list[str]:
    """``a-{08..11}.tar`` → a-08.tar to a-11.tar, as a shell does it; several ranges give all combinations."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if found is None:
        return [text]
    first, last = found.groups()
    width = len(first) if first.startswith("0") else 0
    rests = expand_ranges(text[found.end() :])
    return [f"{text[: found.start()]}{i:0{width}d}{rest}" for i in range(int(first), int(last) + 1) for rest in rests]


def fingerprint(source: PictureSource) -> str:
    """SHA-256 over the order of a source: last parts of the pictures' names, their labels and sizes in bytes."""
    digest = hashlib.sha256()
    for numbers in (source.labels, source.sizes):
        digest.update(np.ascontiguousarray(numbers, dtype=np.int64).tobytes())
    for index in range(len(source.labels)):
        digest.update(source.name(index).rpartition("/")[2].encode() + b"\0")
    return digest.hexdigest()
