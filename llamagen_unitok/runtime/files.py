"""Files that a command writes: checked before the work, complete or not there after it."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def check_writable_file(flag: str, path: Path, endings: tuple[str, ...]) -> None:
    """Raise ValueError, in one line that names `flag`, unless a file can be written at `path`.

    endings: the accepted file endings, in lower case, with their dot.
    """
    if path.suffix.lower() not in endings:
        raise ValueError(f"{flag} {path} must end in {' or '.join(endings)}")
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder: give the name of a file")
    _check_folder(flag, path, path.parent)


def check_writable_folder(flag: str, path: Path) -> None:
    """Raise ValueError, in one line that names `flag`, unless `path` is, or can become, a folder to write in."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{flag} {path} is a file: give a folder")
    _check_folder(flag, path, path if path.is_dir() else path.parent)


def _check_folder(flag: str, path: Path, folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{flag} {path} cannot be written: there is no folder {folder}")
    # Trying is the only check that holds for every user and file system.
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".tmp"):
            pass
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written: {error.strerror} ({folder})") from None


def clear_unfinished(folder: Path, name: str | None = None) -> None:
    """Remove what a killed process left half-written in a folder that one run has to itself, of one `name` or of all.

    Call it before any process of the run writes there. What was being replaced just then gets its name back.
    """
    hidden = ".*" if name is None else f".{glob.escape(name)}.*"
    for left in folder.glob(f"{hidden}.old"):
        whole = folder / left.name[1:].rsplit(".", 2)[0]
        if not whole.exists():
            left.rename(whole)
    for left in (*folder.glob(f"{hidden}.tmp"), *folder.glob(f"{hidden}.old")):
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write; it gets the name `path` when the block ends well, and vanishes when it does not."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            yield file
        unfinished.replace(path)
    finally:
        with suppress(FileNotFoundError):
            unfinished.unlink()
