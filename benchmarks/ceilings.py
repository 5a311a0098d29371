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
    """bandwidth: bytes/s of the fastest way to read a matrix found here.   matrix: FLOP/s of a square product.
    cached: the same as bandwidth for the depth head's weights read again and again; None where no cache holds them."""

    bandwidth: float
    matrix: float
    cached: float | None = None


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
    widest = max(WIDTHS)
    numbers = torch.empty(size // dtype.itemsize // widest * widest, device=device, dtype=dtype).normal_()
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
    return numbers.nbytes / best


def last_level_cache() -> int | None:
    """Bytes of the largest cache of the first CPU, where Linux says it."""
    try:
        sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    except OSError:
        return None
    return max((int(size.rstrip("KM")) << (20 if size.endswith("M") else 10) for size in sizes), default=None)


def head_weights(config: GPTConfig) -> int:
    """How many weights every step of the depth head reads."""
    return config.depth_layers * _block(config) + config.width * config.codebook_size


def for_config(ceilings: Ceilings, config: GPTConfig, device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The ceilings with this generator's `cached`, on a CPU whose last-level cache can hold the depth head."""
    size, cache = head_weights(config) * dtype.itemsize, last_level_cache() if device.type == "cpu" else None
    if cache is None or size >= cache or config.num_codebooks == 1:
        return ceilings._replace(cached=None)
    with torch.inference_mode():
        return ceilings._replace(cached=max(ceilings.bandwidth, _bandwidth(device, torch.float32, max(size, 1 << 20))))


def _block(config: GPTConfig) -> int:
    """Weights of one block's matrices."""
    attention = (config.heads + 2 * config.kv_heads) * config.head_width + config.width
    return config.width * (attention + 3 * config.ffn_width)


def floor_seconds(config: GPTConfig, rows: int, positions: list[int], itemsize: int, ceilings: Ceilings) -> float:
    """The least time of one position of `rows` sequences, the mean over `positions`: no overlap between phases.

    Each phase (trunk, K steps of the depth head, cached keys and values) takes the longer of its bytes and its FLOPs.
    The depth head's first step reads from memory, the others from a cache where one holds its weights. Queries of the
    first step, which see only themselves and need not be computed, are counted: 0.7 % of GPT-B's weights.
    """

    def phase(weights: int, bandwidth: float) -> float:
        return max(weights * itemsize / bandwidth, 2 * rows * weights / ceilings.matrix)

    head = head_weights(config)
    total = phase(config.layers * _block(config), ceilings.bandwidth) + phase(head, ceilings.bandwidth)
    total += (config.num_codebooks - 1) * phase(head, ceilings.cached or ceilings.bandwidth)
    read = statistics.mean(position + 2 for position in positions)  # up to and with it, and it is written
    kv_bytes = rows * config.layers * 2 * config.kv_heads * config.head_width * itemsize * read
    return total + kv_bytes / ceilings.bandwidth
