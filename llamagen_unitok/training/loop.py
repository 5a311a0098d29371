"""The training loop that the tokenizer and the generator share.

The step is the only clock: the batch, the random numbers and the learning rate of a step follow from the seed and the
step's number. A resumed run therefore needs model, optimizer and average, and nothing else, to go on exactly.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.utils.data import Dataset

from llamagen_unitok.runtime.checkpoint import find_checkpoint, load_checkpoint, read_meta, save_checkpoint
from llamagen_unitok.runtime.distributed import World
from llamagen_unitok.runtime.log import TrainingLog
from llamagen_unitok.runtime.memory import keep_freed_memory
from llamagen_unitok.runtime.optim import EMA, clip_gradients, decay_groups, lr_factor
from llamagen_unitok.training.data import step_batches


@dataclass(frozen=True)
class LoopConfig:
    """Settings of a run that do not depend on what is trained."""

    steps: int = field(default=100_000, metadata={"help": "optimizer steps of the whole run"})
    batch_size: int = field(default=256, metadata={"help": "pictures per step, over all processes"})
    lr: float = field(default=3e-4, metadata={"help": "peak learning rate"})
    lr_schedule: str = field(default="cosine", metadata={"help": "after warm-up: cosine, linear (both to 0), constant"})
    warmup_steps: int = field(default=3000, metadata={"help": "steps of linear warm-up"})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW decay of matrices; vectors never decay"})
    beta1: float = field(default=0.9, metadata={"help": "AdamW decay of the gradient mean"})
    beta2: float = field(default=0.95, metadata={"help": "AdamW decay of the squared gradient"})
    grad_clip: float = field(default=1.0, metadata={"help": "largest gradient norm; 0 = no clipping"})
    ema: float = field(default=0.0, metadata={"help": "decay per step of the averaged weights, e.g. 0.9999; 0 = none"})
    precision: str = field(default="bf16", metadata={"help": "bf16 (autocast) or fp32"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the model"})
    seed: int = field(default=0, metadata={"help": "decides weights, order of data, dropout"})
    workers: int = field(default=4, metadata={"help": "data-loading processes per training process"})
    log_every: int = field(default=100, metadata={"help": "steps between log lines"})
    save_every: int = field(default=1000, metadata={"help": "steps between checkpoints"})
    keep: int = field(default=2, metadata={"help": "checkpoints kept"})

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"--precision must be bf16 or fp32, not {self.precision!r}")
        if not self.lr > 0:
            raise ValueError(f"--lr must be above 0, not {self.lr}")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"--warmup-steps {self.warmup_steps} must be fewer than --steps {self.steps}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"--ema must lie in [0, 1), not {self.ema}")
        lr_factor(0, steps=self.steps, warmup_steps=0, schedule=self.lr_schedule)


class Objective(Protocol):
    """What a loop trains: an nn.Module whose forward(*batch) gives the loss and named scalar tensors to log."""

    def __call__(self, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]: ...

    def after_step(self, step: int, world: World) -> None:
        """Called after each optimizer step, e.g. to look after codebooks."""


def train(
    objective: nn.Module,
    dataset: Dataset,
    config: LoopConfig,
    *,
    out: Path,
    resume: str,
    world: World,
    meta: dict[str, Any],
    on_save: Callable[[dict[str, Tensor], int], None],
) -> None:
    """Train `objective` until `config.steps`, from the checkpoint that `resume` means (see find_checkpoint).

    dataset: takes (index, draw) to a tuple of tensors; see step_batches for the order.
    meta: JSON that identifies the run; a checkpoint made with another one is refused.
    on_save(state, step): called on the main process after each checkpoint with the weights to pass on (averaged ones if
    there is an EMA).
    Raises FloatingPointError when the loss is not finite, before the step that would spoil the weights, and
    KeyboardInterrupt on SIGINT or SIGTERM, after a checkpoint of the last full step.
    """
    meta = {**meta, "loop": {k: v for k, v in dataclasses.asdict(config).items() if k not in _MAY_CHANGE}}
    if world.device.type == "cpu":
        keep_freed_memory()
    objective.to(world.device).train()
    optimizer = torch.optim.AdamW(
        decay_groups(objective, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=world.device.type == "cuda",
    )
    ema = EMA(objective, config.ema) if config.ema else None
    parameters = [p for p in objective.parameters() if p.requires_grad]

    step = 0
    found = find_checkpoint(out, resume)
    if found is not None:
        _check_same_run(found, meta)
        state = _run_state(objective, optimizer, ema)
        load_checkpoint(found, state, world)
        objective.load_state_dict(state["model"])
        set_optimizer_state_dict(objective, optimizer, state["optimizer"])
        step = int(read_meta(found)["step"])
    elif resume == "none" and find_checkpoint(out, "auto") is not None:
        raise ValueError(f"{out} already holds a run: continue it with --resume auto, or give another --out")

    wrapped = world.wrap(objective)
    if config.compile:
        wrapped = torch.compile(wrapped)
    log = TrainingLog(out, step, config.steps, config.batch_size) if world.is_main else None
    first_step = saved_step = step

    def save() -> None:
        save_checkpoint(out, step, _run_state(objective, optimizer, ema), meta, world, config.keep)
        if world.is_main:
            on_save(ema.state if ema else objective.state_dict(), step)

    sums: dict[str, Tensor] = {}
    summed = 0
    with _stop_signals() as stop:
        try:
            source = step_batches(
                dataset,
                global_batch=config.batch_size,
                first_step=step,
                steps=config.steps,
                seed=config.seed,
                workers=config.workers,
                world=world,
            )
            while step < config.steps and not world.any(stop.requested):
                factor = lr_factor(
                    step, steps=config.steps, warmup_steps=config.warmup_steps, schedule=config.lr_schedule
                )
                for group in optimizer.param_groups:
                    group["lr"] = config.lr * factor
                batch = next(source)
                seed_step(config.seed, step, world.rank)

                with torch.autocast(world.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    loss, scalars = wrapped(*(t.to(world.device, non_blocking=True) for t in batch))
                loss.backward()
                norm = clip_gradients(parameters, config.grad_clip)
                if not bool(torch.isfinite(norm)):
                    raise FloatingPointError(
                        f"loss {loss.item():g} or gradient norm {norm.item():g} is not finite at step {step} on rank "
                        f"{world.rank}: lower --lr, or resume with --precision fp32"
                    )
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if ema:
                    ema.update(objective, step)
                objective.after_step(step, world)
                step += 1

                for name, value in {**scalars, "grad_norm": norm}.items():
                    sums[name] = sums.get(name, 0) + value.detach()
                summed += 1
                if log:
                    log.advance()
                if step % config.log_every == 0 or step == config.steps:
                    means = {name: world.mean(total).item() / summed for name, total in sums.items()}
                    sums, summed = {}, 0
                    if log:
                        log.write(step, {**means, "lr": config.lr * factor})
                if step % config.save_every == 0 or step == config.steps:
                    save()
                    saved_step = step
            if stop.requested and step < config.steps:
                if saved_step != step:
                    save()
                raise KeyboardInterrupt
            if step == first_step and world.is_main:
                # Killed after its last checkpoint: what is passed on may be missing or older.
                on_save(ema.state if ema else objective.state_dict(), step)
        finally:
            if log:
                log.close()


# Settings that a resumed run may change without becoming another run.
_MAY_CHANGE = ("workers", "log_every", "save_every", "keep", "compile")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's global generators for one step of one process: dropout and label dropout follow from these three."""
    mixed = torch.tensor([seed, step, rank], dtype=torch.int64)
    factors = torch.tensor([6364136223846793005, 1442695040888963407, 3935559000370003845], dtype=torch.int64)
    torch.manual_seed(int((mixed + 1).mul(factors).sum()) & (2**63 - 1))


def _run_state(objective: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None) -> dict[str, Any]:
    state: dict[str, Any] = {
        "model": objective.state_dict(),
        "optimizer": get_optimizer_state_dict(objective, optimizer),
    }
    if ema:
        state["ema"] = ema.state
    return state


def _check_same_run(found: Path, meta: dict[str, Any]) -> None:
    saved = _flat(read_meta(found))
    differing = [
        f"{name} {_short(saved.get(name))} there, {_short(value)} now"
        for name, value in _flat(meta).items()
        if saved.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{found.parent.parent} holds a run with other settings ({'; '.join(differing[:3])}): "
            "give the same ones, or another --out"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:39] + "…"


class _Stop:
    requested = False


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """SIGINT and SIGTERM ask for a stop after the current step; a second one ends at once."""
    stop = _Stop()
    before = {}

    def ask(number: int, _frame: Any) -> None:
        stop.requested = True
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            before[number] = signal.signal(number, ask)
        except ValueError:  # not in the main thread (a test, a notebook): signals stay as they are
            break
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
