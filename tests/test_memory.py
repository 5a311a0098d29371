"""Freed memory stays in the process: counted in page faults, in a process of its own."""

import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys, torch
from llamagen_unitok.runtime.memory import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("no glibc")
fill = lambda: torch.ones(16 << 20)  # 64 MiB, freed at once
for _ in range(8):  # a few, until small blocks have settled around the large one
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS, mode], capture_output=True, text=True)
    if "no glibc" in done.stderr:
        pytest.skip("needs glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_large_blocks_are_used_again():
    assert page_faults("keep") < page_faults("leave") / 10
