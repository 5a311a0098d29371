#!/usr/bin/env python
"""Decoding speed: images/s of the generator, against the floor of this machine and the published loop.

python benchmarks/decode.py --sizes B --batches 1,8 --dtypes fp32,bf16 --baseline --positions 24
Weights are random, so that any size can be timed; logits are as spread as a trained model's. All modes of a row group
take turns in one process. With --positions below the sequence, those positions are spread over it, and the time of a
picture is computed from their mean.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ceilings import Ceilings, floor_seconds, for_config, measure, seconds, synchronize
from benchmarks.kernel_count import count_kernels
from benchmarks.published_loop import PublishedLoop
from benchmarks.report import machine, print_header, print_json, print_row, warn_if_busy
from llamagen_unitok import GPT, GPTConfig
from llamagen_unitok.config import PRESETS
from llamagen_unitok.layers import RMSNorm
from llamagen_unitok.pipeline import DTYPES
from llamagen_unitok.runtime.distributed import pick_device
from llamagen_unitok.runtime.files import check_writable_file, replacing
from llamagen_unitok.runtime.flags import Parser, add_flags, run_cli, settings_from
from llamagen_unitok.runtime.memory import peak_bytes
from llamagen_unitok.sampling import ENGINES, SamplingConfig, decode
from llamagen_unitok.sampling.draws import Draw
from llamagen_unitok.sampling.engines import engine_class
from llamagen_unitok.sampling.kept import Kept
from llamagen_unitok.sampling.steps import Run

NANO = {"layers": 2, "heads": 2, "width": 128, "depth_layers": 1, "num_classes": 10}
SIZES = ("nano", *PRESETS)
LOGIT_STD = 1.9  # entropy about ln 4096 - 1.9² / 2 = 6.5 nats
CHECKED_POSITIONS = 2
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}  # of the largest logit
ROUNDED = {"int8": 0.15}  # engines that round more than the number type does, and so draw other codes
COLUMNS = {
    "size": "", "dtype": "", "batch": "d", "cfg": "g", "mode": "", "ms_per_position": ".2f", "spread": ".0%",
    "images_per_s": ".3g", "first_image_s": ".3g", "peak_gb": ".2f", "floor_ms": ".2f", "of_floor": ".0%",
    "kernels": "d", "speedup": ".2f", "over_fp32": ".2f",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    sizes: str = field(default="nano", metadata={"help": f"of {', '.join(SIZES)}, with commas between them"})
    batches: str = field(default="1,8", metadata={"help": "pictures at a time"})
    cfg: str = field(default="1", metadata={"help": "guidance scales; 1 is no guidance"})
    dtypes: str = field(default="fp32", metadata={"help": f"of {', '.join(DTYPES)}"})
    engines: str = field(default="auto", metadata={"help": f"of auto, {', '.join(ENGINES)}"})
    baseline: bool = field(default=False, metadata={"help": "time the published loop beside them"})
    positions: int = field(default=24, metadata={"help": "positions timed, spread over the sequence; 0 times all"})
    repeats: int = field(default=3, metadata={"help": "of which the median counts"})
    threads: int = field(default=0, metadata={"help": "CPU threads; 0 leaves torch's choice"})
    temperature: float = field(default=1.0, metadata={"help": "as in sample.py"})
    top_k: int = field(default=0, metadata={"help": "as in sample.py"})
    top_p: float = field(default=1.0, metadata={"help": "as in sample.py"})
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda"})
    plot: Path | None = field(default=None, metadata={"help": "PNG of images/s over batch size, with the floor"})


def main(argv: list[str] | None = None) -> int:
    parser = Parser("Time decoding. The last line is JSON.")
    add_flags(parser, Settings)
    flags = parser.parse_args(argv)
    return run_cli(lambda: benchmark(settings_from(Settings, flags)))


def listed(flag: str, text: str, known: tuple[str, ...] | None = None, kind: Callable = str) -> list:
    """The values between the commas; ValueError names the flag."""
    try:
        values = [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} {text} must be numbers with commas between them") from None
    for value in values:
        if known and value not in known:
            raise ValueError(f"{flag} {value} is not known: use {', '.join(known)}")
    return values


def benchmark(settings: Settings) -> None:
    sizes = listed("--sizes", settings.sizes, SIZES)
    batches = listed("--batches", settings.batches, kind=int)
    scales = listed("--cfg", settings.cfg, kind=float)
    dtypes = listed("--dtypes", settings.dtypes, tuple(DTYPES))
    engines = listed("--engines", settings.engines, ("auto", *ENGINES))
    if min(batches) < 1 or settings.repeats < 1 or min(settings.positions, settings.threads) < 0:
        raise ValueError("--batches and --repeats must be at least 1, --positions and --threads at least 0")
    for scale in scales:
        SamplingConfig(
            cfg_scale=scale, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
        )  # which checks them
    if settings.plot:
        check_writable_file("--plot", settings.plot, (".png",))
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = pick_device(settings.device)
    facts = machine(device)
    warn_if_busy(facts, device)
    ceilings = {dtype: measure(device, DTYPES[dtype]) for dtype in dtypes}
    for dtype, (bandwidth, matrix, _) in ceilings.items():
        print(f"{dtype}: matrix-vector {bandwidth / 1e9:.1f} GB/s, matrix product {matrix / 1e9:.0f} GFLOP/s")

    rows: list[dict] = []
    facts["ceilings"] = {}
    for size in sizes:
        gpts = {dtype: random_generator(size, device, DTYPES[dtype]) for dtype in dtypes}
        config = gpts[dtypes[0]].config
        for dtype, gpt in gpts.items():
            check_agreement(gpt, engines, settings)
            ceilings[dtype] = for_config(ceilings[dtype], config, device, DTYPES[dtype])
            if cached := ceilings[dtype].cached:
                print(f"{size} {dtype}: a cache can hold the depth head, {cached / 1e9:.1f} GB/s when read again")
        facts["ceilings"][size] = {dtype: ceiling._asdict() for dtype, ceiling in ceilings.items()}
        print_header(COLUMNS)
        for batch in batches:
            for scale in scales:
                for row in compare(settings, size, gpts, batch, scale, engines, ceilings):
                    print_row(row, COLUMNS)
                    rows.append(row)
    if len(positions_of(settings, config)) < config.num_positions:
        print(f"timed {settings.positions} positions spread over the sequence; the rest follows from their mean")
    print(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}, {facts['code']}")
    print_json(facts, rows)
    if settings.plot:
        plot(settings.plot, rows, facts)


def random_generator(size: str, device: torch.device, dtype: torch.dtype) -> GPT:
    """The same random weights whatever the device and dtype, none of them zero or one."""
    config = GPTConfig(**NANO) if size == "nano" else GPTConfig.preset(size)
    torch.manual_seed(0)
    gpt = GPT(config)
    with torch.no_grad():
        for module in gpt.modules():
            if isinstance(module, RMSNorm):
                module.weight.add_(0.1 * torch.randn_like(module.weight))
        gpt.output.linear_head.weight.normal_(std=LOGIT_STD * config.width**-0.5)
        gpt.output.linear_head.bias.normal_(std=0.1)
    return gpt.to(device, dtype).eval().requires_grad_(False)


def labels_for(gpt: GPT, batch: int) -> Tensor:
    return torch.arange(batch, device=gpt.norm.weight.device) % gpt.config.num_classes


def check_agreement(gpt: GPT, engines: list[str], settings: Settings) -> None:
    """ValueError unless all modes give the same logits for the same codes and, in float32, all engines draw the same
    codes from the same noise: what follows times equal work. Engines in ROUNDED do the same work on rounder numbers."""
    labels = labels_for(gpt, 2)
    shape = (2, CHECKED_POSITIONS, gpt.config.num_codebooks)
    codes = torch.randint(gpt.config.codebook_size, shape, device=labels.device)
    scales = [1.5] * CHECKED_POSITIONS
    seen: dict[str, list[Tensor]] = {}
    drawn: dict[str, Tensor] = {}
    for engine in engines:

        def forced(logits: Tensor, position: int | Tensor, k: int, engine: str = engine) -> Tensor:
            seen.setdefault(engine, []).append(logits.clone())
            return codes[:, len(seen[engine][k :: shape[2]]) - 1, k]

        decode(gpt, labels, forced, scales, engine=engine)
        drawn[engine] = decode(gpt, labels, draw_for(settings, gpt, 2), scales, engine=engine)
    if settings.baseline:
        with torch.inference_mode():
            loop = PublishedLoop(gpt, labels, scale=1.5)
            logits = [loop.step(p, force=codes[:, p]) for p in range(CHECKED_POSITIONS)]
            seen["published"] = list(torch.cat(logits, dim=1).unbind(1))
    dtype, (reference, *_) = gpt.norm.weight.dtype, engines
    first, *others = (torch.stack(logits).float() for logits in seen.values())
    for name, other in zip(list(seen)[1:], others, strict=True):
        off = ((first - other).abs().max() / first.abs().max()).item()
        if not off <= max(AGREEMENT[dtype], ROUNDED.get(name, 0), ROUNDED.get(reference, 0)):
            raise ValueError(f"{name} and {reference} disagree by {off:.1e} of the largest logit")
    exact = [name for name in drawn if name not in ROUNDED]
    for name in exact[1:]:
        if dtype == torch.float32 and not torch.equal(drawn[name], drawn[exact[0]]):
            raise ValueError(f"{name} and {exact[0]} draw different codes from the same noise")


def positions_of(settings: Settings, config: GPTConfig) -> list[int]:
    count = min(settings.positions or config.num_positions, config.num_positions)
    return [int((i + 0.5) * config.num_positions / count) for i in range(count)]


def compare(
    settings: Settings,
    size: str,
    gpts: dict[str, GPT],
    batch: int,
    scale: float,
    engines: list[str],
    ceilings: dict[str, Ceilings],
) -> list[dict]:
    """One row per dtype and mode, timed in turns."""
    config, device = next(iter(gpts.values())).config, next(iter(gpts.values())).norm.weight.device
    positions = positions_of(settings, config)
    modes: dict[tuple[str, str], Mode] = {}
    label = f"{size} batch {batch} cfg {scale:g}"
    named = {
        (dtype, mode): {"size": size, "dtype": dtype, "batch": batch, "cfg": scale, "mode": mode}
        for dtype in gpts
        for mode in (*engines, *(["published"] if settings.baseline else []))
    }

    def drop(name: tuple[str, str]) -> None:
        modes.pop(name, None)
        print(f"{label}, {' '.join(name)}: out of memory", file=sys.stderr)
        if device.type == "cuda":
            torch.cuda.empty_cache()

    with torch.inference_mode():
        for name, row in named.items():
            started, taken = time.perf_counter(), held_bytes(device)
            try:
                mode = modes[name] = (published_mode if name[1] == "published" else engine_mode)(
                    settings, gpts[name[0]], batch, scale, name[1]
                )
                mode.seek(0)
                mode.position(0)
                synchronize(device)
            except torch.OutOfMemoryError:
                drop(name)
                continue
            row["first_image_s"] = time.perf_counter() - started
            # Other modes are there too: what this one added, and the weights.
            weights = sum(parameter.nbytes for parameter in gpts[name[0]].parameters())
            added = peak_bytes(device) - taken + weights if device.type == "cuda" else peak_bytes(device)
            row["peak_gb"] = added / 1e9
        times: dict[tuple[str, str], list[list[float]]] = {name: [] for name in modes}
        for _ in tqdm(range(settings.repeats + 1), desc=label, unit="round", leave=False):
            for name, mode in list(modes.items()):
                try:
                    times[name].append([timed(mode, p, device) for p in positions])
                except torch.OutOfMemoryError:
                    drop(name)
    for (dtype, name), mode in modes.items():
        row, rounds = named[dtype, name], times[dtype, name][1:]  # the first one warms up
        per_position = statistics.mean(map(statistics.median, zip(*rounds, strict=True)))
        totals = [statistics.mean(one) for one in rounds]
        sequences = batch * (1 if scale == 1 else 2)
        floor = floor_seconds(config, sequences, positions, DTYPES[dtype].itemsize, ceilings[dtype])
        row |= {
            "positions": len(positions),
            "ms_per_position": 1e3 * per_position,
            "spread": (max(totals) - min(totals)) / per_position,
            "images_per_s": batch / (config.num_positions * per_position),
            "first_image_s": row["first_image_s"] + (config.num_positions - 1) * per_position,
            "floor_ms": 1e3 * floor,
            "of_floor": floor / per_position,
            "kernels": kernels(mode, positions[-1], device),
        }
    rows = list(named.values())
    for row in rows:
        for key, dtype in (("speedup", row["dtype"]), ("over_fp32", "fp32")):
            for base in rows:
                timed_both = "ms_per_position" in base and "ms_per_position" in row
                if timed_both and base["mode"] == "published" and base["dtype"] == dtype:
                    row[key] = base["ms_per_position"] / row["ms_per_position"]
    return rows


@dataclass(frozen=True)
class Mode:
    """One way to decode, set up. seek: p → p is next.   position: p → runs it."""

    seek: Callable[[int], object]
    position: Callable[[int], object]


def engine_mode(settings: Settings, gpt: GPT, batch: int, scale: float, name: str) -> Mode:
    labels = labels_for(gpt, batch)
    run = Run(labels, (scale,) * gpt.config.num_positions, draw_for(settings, gpt, batch))
    engine = engine_class(name, labels.device.type)(gpt, run, Kept())
    return Mode(engine.seek, engine.position)


def published_mode(settings: Settings, gpt: GPT, batch: int, scale: float, name: str) -> Mode:
    filters = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    return Mode(lambda p: None, PublishedLoop(gpt, labels_for(gpt, batch), scale=scale, **filters).step)


def draw_for(settings: Settings, gpt: GPT, batch: int) -> Draw:
    """The settings' draw, from noise that is the same for every mode."""
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(batch, gpt.config.num_positions, gpt.config.num_codebooks, generator=generator)
    return Draw(uniforms.to(gpt.norm.weight.device), settings.temperature, settings.top_k, settings.top_p)


def timed(mode: Mode, position: int, device: torch.device) -> float:
    mode.seek(position)
    return seconds(lambda: mode.position(position), device)


def held_bytes(device: torch.device) -> int:
    """Memory in use on a CUDA device, whose peak is counted from here on; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


@torch.inference_mode()
def kernels(mode: Mode, position: int, device: torch.device) -> int:
    """Kernels that a CUDA device runs for a position; on a CPU, tensor operations that write (see kernel_count.py)."""
    mode.seek(position)
    if device.type != "cuda":
        return count_kernels(lambda: mode.position(position)).total()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        mode.position(position)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def plot(path: Path, rows: list[dict], facts: dict) -> None:
    """Images/s over batch size, one line a mode, and the floor of each dtype dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if "ms_per_position" not in row:
            continue
        name = f"{row['size']} {row['dtype']} cfg {row['cfg']:g}"
        lines.setdefault(f"{name} {row['mode']}", []).append((row["batch"], row["images_per_s"]))
        lines.setdefault(f"{name} floor", []).append((row["batch"], row["images_per_s"] / row["of_floor"]))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(set(points)), strict=True), "--" if name.endswith("floor") else "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="batch size (pictures)", ylabel="images/s, generator only")
    axes.set_title(f"{facts['device']}, {facts['threads']} threads, {facts['date']}", fontsize=9)
    axes.legend(fontsize=7)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=130)


if __name__ == "__main__":
    sys.exit(main())
