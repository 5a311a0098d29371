"""C++ of ours as a shared library: built where it runs, for the CPU that it runs on, once."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from llamagen_unitok.cache import cache_folder

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared")

_log = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """Why there is no library, in one line."""


def load_library(source: Path, target: str = "native") -> ctypes.CDLL:
    """The library of one C++ file: from the user's cache, or built and kept there, which takes seconds.

    target: the compiler's -march. The name in the cache follows from the source, the command and the CPU, since
    machines that differ may share a home folder. Where the cache cannot be written, it is this process's alone.
    Raises BuildError where there is no compiler ($CXX, else one of COMPILERS), it fails, or the result does not load.
    """
    named = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    compiler = next(filter(None, map(shutil.which, named)), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler was found (looked for {', '.join(named)})")
    command = [compiler, *FLAGS, f"-march={target}"]
    key = hashlib.sha256(repr((source.read_bytes(), command, _cpu())).encode()).hexdigest()[:16]
    kept = cache_folder() / "kernels" / f"{source.stem}-{key}.so"
    if kept.is_file():
        return _load(kept)
    _log.warning("building %s for this CPU: a few seconds, once", source.name)
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / kept.name
        _compile([*command, str(source), "-o", str(built)])
        return _load(kept if _keep(built, kept) else built)


def _cpu() -> str:
    """What tells CPUs apart as far as instructions go."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {features}"


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error.strerror}") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise BuildError(f"{command[0]} failed: {next((line for line in said if 'error' in line), said[0]).strip()}")


def _keep(built: Path, kept: Path) -> bool:
    """Copy a library into the cache, complete or not at all; whether it is there now."""
    unfinished = kept.with_name(f".{kept.name}.{os.getpid()}.tmp")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copy(built, unfinished)
            unfinished.replace(kept)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} does not load: {error}") from None
