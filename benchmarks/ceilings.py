"""What this machine can do, measured in the same run: how fast weights can be read, and how fast matrices multiply."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from llamagen_unitok.config import GPTConfig

READ_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}  # well above any cache
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
REPEATS = 5


class Ceilings(NamedTuple):
    """bandwidth: bytes/s of a matrix-vector product, the most of both layouts.   matrix: FLOP/s of a square one."""

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
    width = 1024
    rows = size // (width * dtype.itemsize)
    weights = torch.randn(rows, width, device=device).to(dtype)
    vector, column = (torch.randn(1, n, device=device).to(dtype) for n in (width, rows))
    products = (lambda: vector @ weights.T, lambda: column @ weights)
    return size / min(seconds(product, device) for _ in range(REPEATS) for product in products)


def floor_seconds(config: GPTConfig, rows: int, positions: list[int], itemsize: int, ceilings: Ceilings) -> float:
    """The least time of one position of `rows` sequences, the mean over `positions`: no overlap between phases.

    Each phase (trunk, depth head, cached keys and values) takes the longer of its bytes and its FLOPs.
    """
    width, ffn = config.width, config.ffn_width
    head_width = config.head_width
    block = width * (config.heads + 2 * config.kv_heads) * head_width + width * width + 3 * width * ffn
    phases = [(config.layers * block, 1)]
    output = width * config.codebook_size
    phases.append((config.depth_layers * block + output, config.num_codebooks))
    total = sum(
        times * max(weights * itemsize / ceilings.bandwidth, 2 * rows * weights / ceilings.matrix)
        for weights, times in phases
    )
    cached = statistics.mean(position + 2 for position in positions)  # read up to and with it, and write it
    kv_bytes = rows * config.layers * 2 * config.kv_heads * head_width * itemsize * cached
    return total + kv_bytes / ceilings.bandwidth
