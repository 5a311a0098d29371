#!/usr/bin/env python
"""Training speed: one step of the generator on random codes, and the depth head's share of it.

python benchmarks/train.py --sizes nano,B --batches 4 --plain
python benchmarks/train.py --sizes XXL --batches 16,32,64 --precision bf16 --compile on --plain
A step is what train_gpt.py does on one device, by the same functions: forward, backward, clipped gradients, AdamW.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ceilings import measure, seconds
from benchmarks.decode import SIZES, listed, random_generator
from benchmarks.plain_step import PlainStep
from benchmarks.report import machine, print_report, warn_if_busy
from llamagen_unitok import GPT
from llamagen_unitok.cross_entropy import cross_entropy
from llamagen_unitok.runtime.distributed import PRECISIONS, World, pick_device, set_float32_products
from llamagen_unitok.runtime.flags import Parser, add_flags, run_cli, settings_from
from llamagen_unitok.runtime.memory import keep_freed_memory, peak_bytes
from llamagen_unitok.runtime.optim import clip_gradients, decay_groups
from llamagen_unitok.runtime.parallel import COMPILE, RECOMPUTE, ParallelModule, wrap_blocks
from llamagen_unitok.training.flops import flops_per_image, peak_flops
from llamagen_unitok.training.generator import GeneratorObjective
from llamagen_unitok.training.loop import LoopConfig, forward_backward

COLUMNS = {"size": "", "precision": "", "batch": "d", "mode": "", "ms_per_step": ".1f", "spread": ".0%",
           "images_per_s": ".3g", "tokens_per_s": ".3g", "head_share": ".0%", "head_flops_share": ".0%",
           "head_of_matrix": ".0%", "tflops": ".3g", "of_matrix": ".0%", "mfu": ".1%", "peak_gb": ".2f",
           "speedup": ".2f"}  # fmt: skip
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative, of the loss


@dataclass(frozen=True)
class Settings:
    sizes: str = field(default="nano", metadata={"help": f"of {', '.join(SIZES)}, with commas between them"})
    batches: str = field(default="4", metadata={"help": "pictures a step"})
    precision: str = field(default="fp32", metadata={"help": "of products", "metavar": "|".join(PRECISIONS)})
    accumulate: int = field(default=1, metadata={"help": "parts that a batch is computed in"})
    checkpoint_activations: str = field(
        default="none", metadata={"help": "what is computed again to save memory", "metavar": "|".join(RECOMPUTE)}
    )
    compile: str = field(default="off", metadata={"help": "torch.compile the blocks", "metavar": "|".join(COMPILE)})
    plain: bool = field(default=False, metadata={"help": "time the plainly written step beside it"})
    peak_tflops: float | None = field(default=None, metadata={"help": "what MFU is a share of; default by GPU name"})
    repeats: int = field(default=3, metadata={"help": "steps, of which the median counts"})
    threads: int = field(default=0, metadata={"help": "CPU threads; 0 leaves torch's choice"})
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda"})

    def trained(self) -> LoopConfig:
        """The same settings as the trainer has them, which also checks them."""
        return LoopConfig(
            precision=self.precision,
            accumulate=self.accumulate,
            checkpoint_activations=self.checkpoint_activations,
            compile=self.compile,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the products."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


class Batch(NamedTuple):
    """labels (B,), codes (B, L, K)."""

    labels: Tensor
    codes: Tensor


def main(argv: list[str] | None = None) -> int:
    parser = Parser("Time training steps. The last line is JSON.")
    add_flags(parser, Settings)
    flags = parser.parse_args(argv)
    return run_cli(lambda: benchmark(settings_from(Settings, flags)))


def benchmark(settings: Settings) -> None:
    sizes = listed("--sizes", settings.sizes, SIZES)
    batches = listed("--batches", settings.batches, kind=int)
    loop = settings.trained()
    if any(batch % loop.accumulate for batch in batches):
        raise ValueError(f"--accumulate {loop.accumulate} does not divide all of --batches {settings.batches}")
    if min(batches) < 1 or settings.repeats < 1:
        raise ValueError("--batches and --repeats must be at least 1")
    if settings.peak_tflops is not None and settings.peak_tflops <= 0:
        raise ValueError(f"--peak-tflops must be above 0, not {settings.peak_tflops}")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = pick_device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()
    facts = machine(device)
    warn_if_busy(facts, device)
    set_float32_products(loop.precision)
    dtype = settings.dtype
    matrix = measure(device, dtype).matrix
    print(f"{loop.precision}: matrix product {matrix / 1e9:.0f} GFLOP/s")
    rows = []
    for size in sizes:
        gpt = random_generator(size, device, torch.float32).train().requires_grad_(True)
        if settings.plain:
            check_agreement(gpt, dtype)
        compiled = loop.compile == "on" or (loop.compile == "auto" and device.type == "cuda")
        wrap_blocks(GeneratorObjective(gpt, 0.0).blocks(), loop.checkpoint_activations, compiled)
        for batch in batches:
            rows += [
                {"size": size, "precision": loop.precision, **row}
                for row in measure_batch(gpt, batch, settings, matrix)
            ]
    print_report(facts, rows, COLUMNS)


def random_batch(gpt: GPT, count: int) -> Batch:
    config, device = gpt.config, gpt.norm.weight.device
    shape = (count, config.num_positions, config.num_codebooks)
    return Batch(
        torch.randint(config.num_classes, (count,), device=device),
        torch.randint(config.codebook_size, shape, device=device),
    )


def autocasting(gpt: GPT, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(gpt.norm.weight.device.type, dtype=dtype, enabled=dtype != torch.float32)


def check_agreement(gpt: GPT, dtype: torch.dtype) -> None:
    """Raise ValueError unless both ways give the same loss, without dropout."""
    batch = random_batch(gpt, 1)
    gpt.eval()
    with torch.no_grad():
        with autocasting(gpt, dtype):
            ours = gpt(*batch, return_loss=True).item()
        plain = PlainStep(gpt, dtype).loss(*batch).item()
    gpt.train()
    if not abs(ours - plain) <= AGREEMENT[dtype] * abs(ours):
        raise ValueError(f"the plain step and ours disagree on the loss: {plain} and {ours}")


def our_step(gpt: GPT, settings: Settings) -> Callable[[Tensor, Tensor], None]:
    loop = settings.trained()
    objective = GeneratorObjective(gpt, class_dropout=0.1)
    world = World(0, 1, gpt.norm.weight.device)
    model = ParallelModule(objective, world, bf16=loop.precision == "bf16", blocks=objective.blocks())
    parameters = list(gpt.parameters())
    fused = world.device.type == "cuda"
    optimizer = torch.optim.AdamW(decay_groups(objective, loop.weight_decay), lr=1e-4, fused=fused)

    def step(labels: Tensor, codes: Tensor) -> None:
        forward_backward(model, (labels, codes, torch.rand(len(labels))), loop.accumulate)
        clip_gradients(parameters, loop.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def plain_step(gpt: GPT, settings: Settings) -> Callable[[Tensor, Tensor], float]:
    return PlainStep(gpt, settings.dtype)


MODES: dict[str, Callable[[GPT, Settings], Callable[[Tensor, Tensor], object]]] = {
    "ours": our_step,
    "plain": plain_step,
}


def measure_batch(gpt: GPT, count: int, settings: Settings, matrix: float) -> list[dict]:
    """A row for each mode, timed in turns; only its name for one that does not fit. Ours has the depth head's forward
    and backward alone beside it."""
    config, device, dtype = gpt.config, gpt.norm.weight.device, settings.dtype
    batch = random_batch(gpt, count)
    hidden = torch.randn(count, config.num_positions, config.width, device=device, requires_grad=True)

    def head() -> None:
        with autocasting(gpt, dtype):
            loss = cross_entropy(gpt.output(hidden, batch.codes), batch.codes).mean()
        loss.backward()
        gpt.zero_grad(set_to_none=True)

    modes = list(MODES) if settings.plain else ["ours"]
    work: dict[str, Callable[[], object]] = {}
    peaks: dict[str, int] = {}
    at_first = allocated(device)
    for mode in modes:  # the first step warms up, and shows the memory of this mode without the states of others
        held = allocated(device) - at_first
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            step = MODES[mode](gpt, settings)
            step(*batch)
        except torch.OutOfMemoryError:
            print(f"batch {count}, {mode}: out of memory", file=sys.stderr)
            gpt.zero_grad(set_to_none=True)
            continue
        work[mode], peaks[mode] = partial(step, *batch), peak_bytes(device) - held
    if "ours" in work:
        work["head"] = head
        head()
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in tqdm(range(settings.repeats), desc=f"batch {count}", unit="round", leave=False):
        for name, once in work.items():
            times[name].append(seconds(once, device))
    taken = {name: statistics.median(values) for name, values in times.items()}

    flops, peak = flops_per_image(config), peak_flops(device, settings.peak_tflops)
    rows = []
    for mode in modes:
        row = {"batch": count, "mode": mode}
        if mode in work:
            per_step = taken[mode]
            rate = count * flops.total / per_step
            row |= {
                "ms_per_step": 1e3 * per_step,
                "spread": (max(times[mode]) - min(times[mode])) / per_step,
                "images_per_s": count / per_step,
                "tokens_per_s": count * config.num_positions * config.num_codebooks / per_step,
                "head_flops_share": flops.head_share,
                "tflops": rate / 1e12,
                "of_matrix": rate / matrix,
                "mfu": rate / peak if peak else None,
                "peak_gb": peaks[mode] / 1e9,
                "speedup": taken["plain"] / per_step if "plain" in work else None,
            }
        if mode == "ours" and mode in work:
            row["head_share"] = taken["head"] / per_step
            row["head_of_matrix"] = count * flops.head / taken["head"] / matrix
        rows.append(row)
    return rows


def allocated(device: torch.device) -> int:
    """Bytes in use on a CUDA device; 0 elsewhere, where only the peak of the whole process is known."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


if __name__ == "__main__":
    sys.exit(main())
