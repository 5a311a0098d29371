"""For tests of native code: they need the compiler that it is built with."""

import shutil

import pytest

from llamagen_unitok.sampling.building import COMPILERS

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no g++")
NATIVE = pytest.param("native", marks=needs_compiler)
