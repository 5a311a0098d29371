#!/usr/bin/env python
"""Tokenizer speed: codes → images by each decoder, and images → codes.

python benchmarks/tokenizer.py --checkpoint checkpoints/emoji --batches 1,8
Without a checkpoint the weights of --preset are random. The ways take turns in one process.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ceilings import seconds
from benchmarks.decode import listed
from benchmarks.report import machine, print_report, warn_if_busy
from llamagen_unitok.pipeline import DECODERS
from llamagen_unitok.runtime.distributed import pick_device
from llamagen_unitok.runtime.flags import Parser, add_flags, run_cli, settings_from
from llamagen_unitok.runtime.memory import peak_bytes
from tokenizer import UniTok, UniTokConfig

COLUMNS = {"what": "", "batch": "d", "ms_per_image": ".2f", "spread": ".0%", "images_per_s": ".3g", "speedup": ".2f",
           "mean_off": ".1e", "peak_gb": ".2f"}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    checkpoint: str | None = field(default=None, metadata={"help": "a bundle or a tokenizer; left out: random weights"})
    preset: str = field(default="vitamin_tiny", metadata={"help": "of the random weights"})
    batches: str = field(default="1", metadata={"help": "pictures at a time, with commas between them"})
    decoders: str = field(default="plain,fast,bf16", metadata={"help": f"of {', '.join(DECODERS)}"})
    repeats: int = field(default=5, metadata={"help": "of which the median counts"})
    threads: int = field(default=0, metadata={"help": "CPU threads; 0 leaves torch's choice"})
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda"})


def main(argv: list[str] | None = None) -> int:
    parser = Parser("Time the tokenizer. The last line is JSON.")
    add_flags(parser, Settings)
    flags = parser.parse_args(argv)
    return run_cli(lambda: benchmark(settings_from(Settings, flags)))


@torch.inference_mode()
def benchmark(settings: Settings) -> None:
    batches = listed("--batches", settings.batches, kind=int)
    decoders = dict.fromkeys(["plain", *listed("--decoders", settings.decoders, tuple(DECODERS))])
    if min(batches) < 1 or settings.repeats < 1 or settings.threads < 0:
        raise ValueError("--batches and --repeats must be at least 1, --threads at least 0")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = pick_device(settings.device)
    facts = machine(device)
    warn_if_busy(facts, device)
    if settings.checkpoint:
        tokenizer = UniTok.from_pretrained(settings.checkpoint)
    else:
        torch.manual_seed(0)
        tokenizer = UniTok(UniTokConfig.preset(settings.preset))
        tokenizer.init_weights()
    tokenizer = tokenizer.to(device).eval()
    config, rows = tokenizer.config, []
    ways = {f"decode {name}": DECODERS[name](tokenizer) for name in decoders}
    for batch in batches:
        shape = (batch, config.num_positions, config.num_codebooks)
        codes = torch.randint(config.codebook_size, shape, device=device)
        images = tokenizer.decode_unclamped(codes)
        work = {name: (lambda way=way, codes=codes: way(codes)) for name, way in ways.items()}
        work["encode"] = lambda images=images: tokenizer.encode(images)
        times: dict[str, list[float]] = {name: [] for name in work}
        for _ in tqdm(range(settings.repeats + 1), desc=f"batch {batch}", unit="round", leave=False):
            for name, run in work.items():
                times[name].append(seconds(run, device))
        medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}  # the first warms up
        for name, median in medians.items():
            decodes = name in ways
            rows.append(
                {
                    "what": name,
                    "batch": batch,
                    "ms_per_image": 1e3 * median / batch,
                    "spread": (max(times[name][1:]) - min(times[name][1:])) / median,
                    "images_per_s": batch / median,
                    "speedup": medians["decode plain"] / median if decodes else None,
                    "mean_off": (ways[name](codes) - images).abs().mean().item() if decodes else None,
                    "peak_gb": peak_bytes(device) / 1e9,
                }
            )
    print_report(facts, rows, COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
