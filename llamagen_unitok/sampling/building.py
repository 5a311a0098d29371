"""C++ of ours as a shared library: built where it runs, for the CPU that it runs on, once."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from llamagen_unitok.cache import cache_folder

COMPILERS = ("g++", "c++")  # after $CXX
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared")
LONGEST = 300.0  # seconds that a compiler may take

_log = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """Why there is no library, in one line."""


def load_library(source: Path, target: str = "native") -> ctypes.CDLL:
    """The library of one C++ file, from the user's cache, or built and kept there, which takes seconds.

    target: the compiler's -march. The name in the cache follows from the source, the command and the machine, since
    machines that differ may share a home folder. Where the cache cannot be written, it is this process's alone.
    Raises BuildError where no compiler ($CXX, else one of COMPILERS) is there or makes a library that loads.
    """
    failure = None
    for compiler in _compilers():
        command = [*compiler, *FLAGS, f"-march={target}"]
        try:
            return _built(source, command)
        except (BuildError, OSError) as error:
            failure = failure or BuildError(str(error))
    raise failure or BuildError(f"no C++ compiler was found (looked for {', '.join(COMPILERS)} and $CXX)")


def _compilers() -> Iterator[list[str]]:
    for name in (os.environ.get("CXX", ""), *COMPILERS):
        words = shlex.split(name)  # "ccache g++" is two
        if words and shutil.which(words[0]):
            yield [str(shutil.which(words[0])), *words[1:]]


def _built(source: Path, command: list[str]) -> ctypes.CDLL:
    key = hashlib.sha256(repr((source.read_bytes(), command, _machine())).encode()).hexdigest()[:16]
    name = f"{source.stem}-{key}.so"
    with suppress(OSError, RuntimeError):  # RuntimeError: this user has no home
        kept = cache_folder() / "kernels" / name
        if kept.is_file():
            return _loaded(kept)
    _log.warning("building %s for this CPU: a few seconds, once", source.name)
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / name
        _compile([*command, str(source), "-o", str(built)])
        library = _loaded(built)
        with suppress(OSError, RuntimeError):
            _keep(built, cache_folder() / "kernels" / name)
        return library


def _machine() -> str:
    """What tells machines apart as far as instructions and the C library go."""
    features = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {platform.libc_ver()} {features}"


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LONGEST)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} did not end within {LONGEST:.0f} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise BuildError(f"{command[0]} failed: {next((line for line in said if 'error' in line), said[0]).strip()}")


def _keep(built: Path, kept: Path) -> None:
    """Copy a library into the cache, complete or not at all."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    unfinished = kept.with_name(f".{kept.name}.{os.getpid()}.tmp")
    try:
        shutil.copy(built, unfinished)
        unfinished.replace(kept)
    finally:
        unfinished.unlink(missing_ok=True)


def _loaded(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} does not load: {error}") from None
