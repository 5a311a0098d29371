"""Well-known checkpoints by name: downloaded and converted once, then a bundle in the cache.

CACHE/files/USER/REPOSITORY/NAME.pt    as published; can be put there by hand, and removed once converted
CACHE/models/PRESET/                   the bundle, or the tokenizer folder, made of them
"""

from __future__ import annotations

import sys
from pathlib import Path

from llamagen_unitok.cache import CACHE_VARIABLE, cache_folder
from llamagen_unitok.published.convert import Conversion, convert
from llamagen_unitok.published.download import LOCAL_FAILURES, DamagedDownload, download_from_hub
from llamagen_unitok.published.presets import GENERATORS, TOKENIZERS, HubFile
from llamagen_unitok.runtime.files import clear_unfinished
from modelfolder import ModelFolderError, file_hash, locate
from modelfolder.folder import CONFIG_NAME


def locate_model(name: str | Path, device: str = "auto") -> Path:
    """The folder of a published checkpoint by its name in the tables, else of any bundle or model (`locate`).

    The first use of a name downloads and converts, which takes minutes; on `device` it draws the picture that checks
    the result. Raises ValueError, in one line; where a file
    cannot be had, it names the files and the folder to put them in.
    """
    if str(name) in GENERATORS or str(name) in TOKENIZERS:
        return published_model(str(name), device)
    try:
        return locate(name)
    except ModelFolderError as error:
        if "/" in str(name) or Path(name).exists():
            raise
        known = ", ".join((*GENERATORS, *TOKENIZERS))
        raise ModelFolderError(f"{error}, or the name of a published checkpoint: {known}") from None


def published_model(name: str, device: str = "auto") -> Path:
    """The converted bundle (or tokenizer folder) of a name in the tables; made now if it is not there yet."""
    from huggingface_hub.utils import WeakFileLock

    folder = cache_folder() / "models" / name
    if _is_model(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder.parent} cannot be written ({error.strerror}): set {CACHE_VARIABLE}") from None
    # Several processes of one run ask at once: one makes the bundle, the others wait for it.
    with WeakFileLock(folder.with_name(f".{name}.lock")):
        if not _is_model(folder):
            clear_unfinished(folder.parent, name)
            _make(name, folder, device)
    return folder


def _make(name: str, folder: Path, device: str) -> None:
    row = GENERATORS.get(name)
    files = row.files if row else (TOKENIZERS[name].file,)
    paths = fetch(name, files)
    for path in paths:
        _say(f"{path.name}: SHA-256 {file_hash(path)}")
    _say(f"converting to {folder}, once, and drawing a picture as a check")
    # The row's size, not the name of the file, says what must come out.
    settings = Conversion(image_size=row.image_size if row else TOKENIZERS[name].img_size)
    convert(paths, folder, settings, device=device, progress=True, size=row.size if row else None)


def fetch(name: str, files: tuple[HubFile, ...]) -> list[Path]:
    """The published files on this disk, downloaded where they are not there; resumes, and shows progress.

    A file gets its name when it is complete and, where the hub says its SHA-256, has that. Raises ValueError, in one
    line: with all missing files and where to put them when the hub is out of reach, or with what is wrong here (a full
    disk).
    """
    paths = [cache_folder() / "files" / file.repository / file.name for file in files]
    for file, path in zip(files, paths, strict=True):
        if path.is_file():
            continue
        _say(f"downloading {file.name} from {file.repository} (licence: {file.licence})")
        try:
            download_from_hub(file, path)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in LOCAL_FAILURES:
                raise ValueError(f"{path} cannot be written: {error.strerror}; set {CACHE_VARIABLE}") from error
            if isinstance(error, DamagedDownload):
                raise
            # The hub library raises a dozen types for "not there", "no network" and "no permission".
            missing = [other.name for other, its in zip(files, paths, strict=True) if not its.is_file()]
            them = "them" if len(missing) > 1 else "it"
            raise ValueError(
                f"{name} needs {' and '.join(missing)} of the hub repository {file.repository}, which is out of reach "
                f"({type(error).__name__}): check the network, or put {them} into {path.parent}"
            ) from error
    return paths


def _is_model(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file() or (folder / "generator" / CONFIG_NAME).is_file()


def _say(text: str) -> None:
    print(text, file=sys.stderr)
