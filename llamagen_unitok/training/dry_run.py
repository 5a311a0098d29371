"""What a run will be, before it is one: parameters, FLOPs, memory per GPU, time. Nothing is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from llamagen_unitok.config import GPTConfig
from llamagen_unitok.runtime.parallel import pick_by_memory
from llamagen_unitok.training.data import CodeMeta
from llamagen_unitok.training.flops import duration, flops_per_image, memory, parameters, spelled_hours
from llamagen_unitok.training.generator import GeneratorTraining
from llamagen_unitok.training.loop import LoopConfig

DEFAULT_PEAK_TFLOPS = 989.0  # dense bf16 of an H100 or H200
GPUS_OF_A_NODE = 8  # for --parallel hsdp without --shard-size
# What a dry run without --codes counts for: ten-crop codes of ImageNet-1k by UniTok.
IMAGENET = CodeMeta(
    tokenizer="unitok",
    tokenizer_hash="",
    img_size=256,
    grid=16,
    num_codebooks=8,
    codebook_size=4096,
    views=[""] * 10,
    class_names=[""] * 1000,
    shard_sizes=[1_281_167],
    checksums=[""],
)


@dataclass(frozen=True)
class DryRun:
    """Settings of the estimate."""

    gpus: int = field(default=8, metadata={"help": "for --dry-run: GPUs of the run"})
    gpu_memory: float = field(
        default=85.0,
        metadata={"help": "for --dry-run: 10⁹ bytes of one GPU: 85 is an 80 GB card, 150 a 141 GB one"},
    )
    mfu: float = field(default=0.5, metadata={"help": "for --dry-run: share of --peak-tflops that is reached, 0 to 1"})

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"--gpus must be at least 1, not {self.gpus}")
        if not 0 < self.gpu_memory < math.inf:
            raise ValueError(f"--gpu-memory must be above 0, not {self.gpu_memory}")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"--mfu must lie in (0, 1], not {self.mfu}")


def dry_run(settings: DryRun, config: GPTConfig, training: GeneratorTraining, loop: LoopConfig, pictures: int) -> str:
    """A screen of text. pictures: that are trained on.

    ValueError if the batch does not divide into the GPUs and their parts, or the GPUs into shards.
    """
    if loop.batch_size % (settings.gpus * loop.accumulate):
        parts = f" and --accumulate {loop.accumulate}" if loop.accumulate > 1 else ""
        raise ValueError(f"--batch-size {loop.batch_size} does not divide into --gpus {settings.gpus}{parts}")
    counted, flops = parameters(config), flops_per_image(config, training.head_share)
    batch = loop.batch_size // settings.gpus // loop.accumulate
    kind, shards = _shards(settings, loop, counted.total)
    needed = memory(
        config,
        batch=batch,
        shards=shards,
        ema=loop.ema > 0,
        head_share=training.head_share,
        bf16=loop.precision == "bf16",
        recompute=loop.checkpoint_activations,
        accumulate=loop.accumulate,
    )
    room = ""
    if needed.total > settings.gpu_memory * 1e9:
        room = f"more than the {settings.gpu_memory:g} GB of --gpu-memory: see --accumulate, --checkpoint-activations"
    peak = training.peak_tflops or DEFAULT_PEAK_TFLOPS
    images = loop.steps * loop.batch_size
    time = duration(flops, images, devices=settings.gpus, peak=peak * 1e12, mfu=settings.mfu)
    trunk, attention, head = (part / 1e12 for part in flops)
    rows = {
        "model": f"{training.model}: {config.layers} layers, width {config.width}, {config.heads} heads, depth head of "
        f"{config.depth_layers}; {config.num_positions} positions × {config.num_codebooks} codes of "
        f"{config.codebook_size}",
        "parameters": f"{_count(counted.total)} = trunk {_count(counted.trunk)} + head {_count(counted.head)} + "
        f"input tables {_count(counted.embeddings)}",
        "FLOPs/image": f"{flops.total / 1e12:.3f} T = trunk {trunk:.3f} + attention {attention:.3f} + head {head:.3f} "
        f"(head: {flops.head_share:.0%})",
        "run": f"{loop.steps:,} steps of {loop.batch_size} = {images:,} images, {images / pictures:.4g} epochs of "
        f"{pictures:,} pictures",
        "memory/GPU": " + ".join(f"{name} {value / 1e9:.1f}" for name, value in needed._asdict().items() if value)
        + f" = {needed.total / 1e9:.1f} GB",
        "": f"{batch} images at once; --parallel {kind}; recomputed activations: {loop.checkpoint_activations}",
        " ": "activations: what the backward needs, operation by operation, and cast weights; no short-lived buffers",
        **({"!": room} if room else {}),
        "speed": f"{time.images_per_sec:.0f} images/s on {settings.gpus} GPUs, "
        f"{time.images_per_sec / settings.gpus:.0f} each, at {settings.mfu:.0%} of {peak:g} TFLOP/s; "
        "the loader must deliver as many",
        "time": f"{spelled_hours(time.hours)}, {time.device_hours:,.0f} GPU-hours",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows.items())


def _shards(settings: DryRun, loop: LoopConfig, count: int) -> tuple[str, int]:
    """What --parallel comes to on these GPUs, in words, and how many of them share one copy of `count` parameters."""
    gpus, kind = settings.gpus, loop.parallel
    if gpus == 1:
        return "none, one process", 1
    if kind == "auto":
        kind = pick_by_memory(count, settings.gpu_memory * 1e9)
    match kind:
        case "ddp":
            shards, words = 1, "a copy of the model on each GPU"
        case "fsdp":
            shards, words = gpus, f"one copy on {gpus} GPUs"
        case _:
            shards = loop.shard_size or min(GPUS_OF_A_NODE, gpus)
            words = f"a copy on every {shards} GPUs"
    if gpus % shards:
        raise ValueError(f"--shard-size {shards} does not divide --gpus {gpus}")
    return f"{kind}, {words}", shards


def _count(number: int) -> str:
    return f"{number / 1e9:.3f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"
