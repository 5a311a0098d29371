#!/usr/bin/env python
"""Speed of the data loader alone: code shards → batches, as train_gpt.py reads them, and nothing else.

python benchmarks/loader.py --workers 0,2
Without --codes the shards are random ones in a temporary folder. `per_core` is what counts on a busy machine: samples
for a second of processor time, of this process and its workers together.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.decode import listed
from benchmarks.report import machine, print_report, warn_if_busy
from llamagen_unitok.runtime.distributed import World
from llamagen_unitok.runtime.flags import Parser, add_flags, run_cli, settings_from
from llamagen_unitok.training.data import (
    CodeMeta,
    CodeShards,
    TrainingCodes,
    step_batches,
    write_meta,
    write_shard,
)
from modelfolder import file_hash

COLUMNS = {"workers": "d", "batch": "d", "samples_per_s": ".4g", "per_core": ".4g", "gpus_per_core": ".3g",
           "open_ms": ".3g", "first_batch_ms": ".3g", "anon_growth_mb": ".3g"}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    codes: Path | None = field(default=None, metadata={"help": "folder of code shards; left out: random ones"})
    entries: int = field(default=20_000, metadata={"help": "random shards: pictures"})
    views: int = field(default=10, metadata={"help": "random shards: views of each"})
    batch_size: int = field(default=256, metadata={"help": "samples a step"})
    workers: str = field(default="0", metadata={"help": "data-loading processes, with commas between several"})
    steps: int = field(default=40, metadata={"help": "batches that are timed, after as many that warm up"})
    gpu_rate: float = field(
        default=138, metadata={"help": "images/s that one GPU trains on: XXL at half an H200's peak"}
    )


def main(argv: list[str] | None = None) -> int:
    parser = Parser("Time the data loader. The last line is JSON.")
    add_flags(parser, Settings)
    flags = parser.parse_args(argv)
    return run_cli(lambda: benchmark(settings_from(Settings, flags)))


def benchmark(settings: Settings) -> None:
    workers = listed("--workers", settings.workers, kind=int)
    if min(settings.entries, settings.views, settings.batch_size, settings.steps) < 1 or min(workers) < 0:
        raise ValueError("--entries, --views, --batch-size and --steps must be at least 1, --workers at least 0")
    facts = machine(torch.device("cpu"))
    warn_if_busy(facts, torch.device("cpu"))
    rows = []
    with nullcontext(settings.codes) if settings.codes else tempfile.TemporaryDirectory() as folder:
        if settings.codes is None:
            random_shards(Path(folder), settings.entries, views=settings.views)
        for count in tqdm(workers, desc="timing", unit="setting", leave=False):
            rows.append(time_loader(Path(folder), settings, count))
    print_report(facts, rows, COLUMNS)


def time_loader(folder: Path, settings: Settings, workers: int) -> dict[str, float]:
    """One row: opening, the first batch, then the rate over --steps batches."""
    started = time.perf_counter()
    shards = CodeShards(folder)
    opened = time.perf_counter()
    batches = step_batches(
        TrainingCodes(shards, 0),
        global_batch=settings.batch_size,
        first_step=0,
        steps=2 * settings.steps,
        seed=0,
        workers=workers,
        world=World(0, 1, torch.device("cpu")),
    )
    processor = processor_seconds()
    next(batches)
    first = time.perf_counter()
    for _ in range(settings.steps - 1):
        next(batches)
    memory, warm = anonymous_bytes(), time.perf_counter()
    for _ in range(settings.steps):
        next(batches)
    seconds, growth = time.perf_counter() - warm, anonymous_bytes() - memory
    batches.close()  # ends the workers, whose processor time counts once they have ended
    per_core = 2 * settings.steps * settings.batch_size / (processor_seconds() - processor)
    return {
        "workers": workers,
        "batch": settings.batch_size,
        "samples_per_s": settings.steps * settings.batch_size / seconds,
        "per_core": per_core,
        "gpus_per_core": per_core / settings.gpu_rate,
        "open_ms": 1e3 * (opened - started),
        "first_batch_ms": 1e3 * (first - opened),
        "anon_growth_mb": growth / 1e6,
    }


def random_shards(
    folder: Path,
    entries: int,
    *,
    views: int = 1,
    grid: int = 16,
    num_codebooks: int = 8,
    codebook_size: int = 4096,
    shard_size: int = 20_000,
) -> CodeMeta:
    """Write shards of random codes; entry i has label i mod 1,000."""
    rng = np.random.default_rng(0)
    sizes = [min(shard_size, entries - first) for first in range(0, entries, shard_size)]
    checksums = []
    for index, size in enumerate(sizes):
        shape = (size, views, grid**2, num_codebooks)
        codes = rng.integers(0, codebook_size, shape, dtype=np.uint16)
        labels = (np.arange(size) + index * shard_size) % 1000
        checksums.append(file_hash(write_shard(folder, index, len(sizes), codes, labels)))
    names = [f"class {label}" for label in range(1000)]
    view_names = [f"view {view}" for view in range(views)]
    meta = CodeMeta(
        "random", "0" * 64, 16 * grid, grid, num_codebooks, codebook_size, view_names, names, sizes, checksums
    )
    write_meta(folder, meta)
    return meta


def processor_seconds() -> float:
    """Processor time so far, of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def anonymous_bytes(process: int | str = "self") -> int:
    """Memory of a process that is its own, without mapped files, which the system takes back when it likes (Linux)."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise ValueError("this system does not tell a process's own memory")


if __name__ == "__main__":
    sys.exit(main())
