"""For tests of native code: they need the compiler that it is built with."""

import subprocess

import pytest


def _is_there() -> bool:
    """Whether g++ is GNU's; on some systems the name stands for another compiler."""
    try:
        said = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return False
    return "Free Software Foundation" in said


needs_compiler = pytest.mark.skipif(not _is_there(), reason="there is no GNU C++ compiler")
NATIVE = pytest.param("native", marks=needs_compiler)
