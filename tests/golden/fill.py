"""The seeded fill: weights that follow from their names and shapes, so that goldens need no checkpoint beside them.

For an array called `name`:

- Noise. PCG64, seeded with the CRC-32 of the name plus the seed, gives 64-bit words. Each is two 32-bit words, the low
  half first, and the upper 24 bits n of such a word make n / 2^23 - 1. Times √3 (rounded to float32) this has unit
  variance. It fills the array in row-major order.
- Scale. With two or more axes: times 1/√(product of all sizes but the first), rounded to float32. A vector whose name
  ends in ".weight", or a scalar: 1 + 0.1 × noise. Another vector: 0.02 × noise. Certain buffers: zeros.

Every operation is an exact integer one or a single float32 one, so the result is the same to the bit everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from zlib import crc32

import numpy as np

ZERO_BUFFERS = {"vocab_usage", "zero_k_bias", "codebook_used"}


def seeded_fill(name: str, shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """The float32 array of `shape` that the fill puts under the state-dict key `name`."""
    shape = tuple(shape)
    if name.split(".")[-1] in ZERO_BUFFERS:
        return np.zeros(shape, np.float32)
    noise = _noise(crc32(name.encode()) + seed, prod(shape)).reshape(shape)
    if len(shape) > 1:
        return noise * np.float32(1 / sqrt(prod(shape[1:])))
    if shape == () or name.endswith(".weight"):
        return noise * np.float32(0.1) + np.float32(1)
    return noise * np.float32(0.02)


def fill_crc32(array: np.ndarray) -> int:
    """CRC-32 of the array as little-endian float32, row by row."""
    return crc32(array.astype("<f4").tobytes())


def _noise(seed: int, count: int) -> np.ndarray:
    words = np.random.PCG64(seed).random_raw(-(-count // 2))
    low, high = words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)
    upper24 = np.stack((low, high), axis=1).ravel()[:count] >> np.uint64(8)
    unit = upper24.astype(np.float32) * np.float32(2**-23) - np.float32(1)
    return unit * np.float32(sqrt(3))
