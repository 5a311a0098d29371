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


IS_THERE = _is_there()
AUTO_ON_CPU = "native" if IS_THERE else "packed"
needs_compiler = pytest.mark.skipif(not IS_THERE, reason="there is no GNU C++ compiler")
NATIVE = pytest.param("native", marks=needs_compiler)
