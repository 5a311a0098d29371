"""What this machine can do, measured in the same run: how fast weights can be read, and how fast matrices multiply."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from llamagen_unitok.config import GPTConfig
from llamagen_unitok.sampling.packed import pack

READ_BYTES = {"cpu": 512 << 20, "cuda": 4 << 30}  # above any cache
WIDTHS = (1024, 4096)  # of the matrices: kernels differ in which shapes they like
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
REPEATS = 5


class Ceilings(NamedTuple):
    """bandwidth: bytes/s of the fastest way to read a matrix found here.   matrix: FLOP/s of a square product."""

    bandwidth: float
    matrix: float


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best of a few repeats of each, on random data: products of zeros are faster."""
    kind = device.type if device.type in READ_BYTES else "cpu"
    with torch.inference_mode():
        # Bytes are bytes: where a type has a slow vector kernel, float32 shows what the memory gives.
        bandwidth = max(_bandwidth(device, one, READ_BYTES[kind]) for one in {dtype, torch.float32})
        side = MATRIX_SIDE[kind]
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        a @ b
        matrix = 2 * side**3 / min(seconds(lambda: a @ b, device) for _ in range(REPEATS))
    return Ceilings(bandwidth, matrix)


def _bandwidth(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """The best of a plain read and of matrix-vector products in several shapes and layouts, those of the engines too.

    No single kernel is the measure: on one machine the plain product reached half of what the packed engine reads.
    """
    numbers = torch.empty(size // dtype.itemsize, device=device, dtype=dtype).normal_()
    best = min(seconds(numbers.sum, device) for _ in range(REPEATS))
    for width in WIDTHS:
        weights = numbers.view(-1, width)
        vector, column = (torch.randn(1, n, device=device).to(dtype) for n in (width, len(weights)))
        products = [lambda w=weights, v=vector: v @ w.T, lambda w=weights, v=column: v @ w]
        if device.type == "cpu":
            packed = pack(weights, None, rows=1)
            products.append(lambda run=packed, v=vector: run(v))
        best = min(best, *(seconds(product, device) for product in products for _ in range(REPEATS)))
        del products
    return size / best


def last_level_cache() -> int | None:
    """Bytes of the largest cache of the first CPU, where Linux says it."""
    try:
        sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    except OSError:
        return None
    return max((int(size.rstrip("KM")) << (20 if size.endswith("M") else 10) for size in sizes), default=None)


def in_cache(config: GPTConfig, itemsize: int, cache: int | None) -> str | None:
    """Which of the weights that a floor counts as read from memory can stay in a cache of so many bytes instead."""
    if cache is None:
        return None
    trunk, head = config.layers * _block(config), config.depth_layers * _block(config)
    head += config.width * config.codebook_size
    for what, weights in (("all weights", trunk + head), ("the depth head's weights", head)):
        if weights * itemsize < cache:
            return f"{what} ({weights * itemsize / 1e6:.0f} MB)"
    return None


def _block(config: GPTConfig) -> int:
    """Weights of one block's matrices."""
    attention = (config.heads + 2 * config.kv_heads) * config.head_width + config.width
    return config.width * (attention + 3 * config.ffn_width)


def floor_seconds(config: GPTConfig, rows: int, positions: list[int], itemsize: int, ceilings: Ceilings) -> float:
    """The least time of one position of `rows` sequences, the mean over `positions`: no overlap between phases.

    Each phase (trunk, depth head, cached keys and values) takes the longer of its bytes and its FLOPs.
    """
    block = _block(config)
    phases = [(config.layers * block, 1)]
    output = config.width * config.codebook_size
    phases.append((config.depth_layers * block + output, config.num_codebooks))
    total = sum(
        times * max(weights * itemsize / ceilings.bandwidth, 2 * rows * weights / ceilings.matrix)
        for weights, times in phases
    )
    cached = statistics.mean(position + 2 for position in positions)  # read up to and with it, and write it
    kv_bytes = rows * config.layers * 2 * config.kv_heads * config.head_width * itemsize * cached
    return total + kv_bytes / ceilings.bandwidth
