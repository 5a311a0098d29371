"""Memory of the process: what the C library does with large blocks that were freed."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

# Names and numbers of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_LARGEST_INT = 2**31 - 1
_PAD_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Keep large freed blocks in the process, for the next tensor of that size; True where that could be arranged.

    glibc gives blocks above 32 MiB back to the system at once, and every training step on a CPU then takes them again
    as zeroed pages, which costs it a good part of its time. The process holds on to its peak instead. Linux with glibc
    only; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _LARGEST_INT), (_M_TOP_PAD, _PAD_BYTES))
    return all([mallopt(name, value) for name, value in settings])


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: of the CUDA device since its counter was reset, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def explained_memory(doing: str) -> Iterator[None]:
    """ValueError, in one line that goes on with `doing`, where a device has too little memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise ValueError(f"out of memory {doing}") from None


def explained_batch(rows: int) -> AbstractContextManager[None]:
    """The same, for work in batches of so many rows."""
    return explained_memory(f"with batches of {rows}: use a smaller --batch-size")
