"""C++ of ours as a shared library: built where it runs, for the CPU that it runs on, once."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from llamagen_unitok.cache import cache_folder

COMPILERS = ("g++", "c++")  # after $CXX
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared")
LONGEST = 120.0  # seconds that a compiler may take
DIGEST = 32  # bytes behind a kept library: its SHA-256, since loading half a library would end the process

_log = logging.getLogger(__name__)


class BuildError(Exception):
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
    tried = set()
    for name in (os.environ.get("CXX", ""), *COMPILERS):
        try:
            words = shlex.split(name)  # "ccache g++" is two
        except ValueError:
            continue
        program = shutil.which(words[0]) if words else None
        if program and (os.path.realpath(program), *words[1:]) not in tried:
            tried.add((os.path.realpath(program), *words[1:]))
            yield [program, *words[1:]]


def _built(source: Path, command: list[str]) -> ctypes.CDLL:
    key = hashlib.sha256(repr((source.read_bytes(), command, _machine())).encode()).hexdigest()[:16]
    name = f"{source.stem}-{key}.so"
    try:
        kept = cache_folder() / "kernels" / name
        if _is_whole(kept):
            return _loaded(kept)
    except (BuildError, OSError, RuntimeError):
        # It does not load, cannot be read, or this user has no home: built again, for this process.
        kept = None
    _log.warning("building %s for this CPU: a few seconds, once", source.name)
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / name
        _compile([*command, str(source), "-o", str(built)])
        library = _loaded(built)
        with suppress(OSError):
            if kept:
                _keep(built, kept)
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
        compiler = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
            start_new_session=True,
        )
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error.strerror}") from None
    with compiler:
        try:
            said = compiler.communicate(timeout=LONGEST)[1]
        except BaseException as error:
            os.killpg(compiler.pid, signal.SIGKILL)  # the programs that it started too
            if isinstance(error, subprocess.TimeoutExpired):
                raise BuildError(f"{command[0]} did not end within {LONGEST:.0f} s") from None
            raise
    if compiler.returncode:
        lines = [line.strip() for line in said.splitlines() if line.strip()] or ["no reason given"]
        told = (line for line in lines if any(word in line for word in ("error", "cannot find", "undefined")))
        raise BuildError(f"{command[0]} failed: {next(told, lines[0])}")


def _is_whole(kept: Path) -> bool:
    if not kept.is_file():
        return False
    content = kept.read_bytes()
    return hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def _keep(built: Path, kept: Path) -> None:
    """Copy a library into the cache, complete or not at all, with its digest behind it."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    number, unfinished = tempfile.mkstemp(dir=kept.parent, prefix=f".{kept.name}.", suffix=".tmp")
    try:
        content = built.read_bytes()
        with open(number, "wb") as file:
            file.write(content + hashlib.sha256(content).digest())
        os.replace(unfinished, kept)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _loaded(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} does not load: {error}") from None
