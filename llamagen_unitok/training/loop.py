"""The training loop that the tokenizer and the generator share.

The step is the only clock: the batch, the random numbers and the learning rate of a step follow from the seed and the
step's number. A resumed run therefore needs model, optimizer and average, and nothing else, to go on exactly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.data import Dataset

from llamagen_unitok.runtime.agreement import Agreement
from llamagen_unitok.runtime.checkpoint import (
    Checkpoints,
    find_checkpoint,
    load_checkpoint,
    read_meta,
)
from llamagen_unitok.runtime.distributed import PRECISIONS, World, set_float32_products
from llamagen_unitok.runtime.files import clear_unfinished
from llamagen_unitok.runtime.log import TrainingLog, tell
from llamagen_unitok.runtime.memory import explained_memory, keep_freed_memory, peak_bytes
from llamagen_unitok.runtime.optim import EMA, clip_gradients, decay_groups, lr_factor
from llamagen_unitok.runtime.parallel import (
    COMPILE,
    PARALLEL,
    RECOMPUTE,
    ParallelModule,
    gather_state,
    wrap_blocks,
)
from llamagen_unitok.runtime.stop import stop_signals
from llamagen_unitok.training.data import step_batches
from llamagen_unitok.training.resuming import (
    CHANGES,
    FREE,
    changed_settings,
    check_newest,
    earlier_changes,
    told_change,
)


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
    precision: str = field(
        default="bf16",
        metadata={
            "help": "of products: bf16, tf32 (CUDA) or fp32; weights are always fp32",
            "metavar": "|".join(PRECISIONS),
        },
    )
    accumulate: int = field(default=1, metadata={"help": "parts that each process's batch is computed in, for memory"})
    parallel: str = field(
        default="auto",
        metadata={
            "help": "ddp replicates, fsdp shards over all processes, hsdp within nodes",
            "metavar": "|".join(PARALLEL),
        },
    )
    shard_size: int = field(default=0, metadata={"help": "hsdp: processes that share one copy; 0 = those of a node"})
    checkpoint_activations: str = field(
        default="none",
        metadata={"help": "what is computed again to save memory", "metavar": "|".join(RECOMPUTE)},
    )
    compile: str = field(
        default="auto", metadata={"help": "torch.compile the blocks; auto = on CUDA", "metavar": "|".join(COMPILE)}
    )
    seed: int = field(default=0, metadata={"help": "decides weights, order of data, dropout"})
    workers: int = field(default=4, metadata={"help": "data-loading processes per training process"})
    log_every: int = field(default=100, metadata={"help": "steps between log lines"})
    save_every: int = field(default=1000, metadata={"help": "steps between checkpoints"})
    keep: int = field(default=2, metadata={"help": "newest checkpoints kept"})
    keep_every: int = field(default=0, metadata={"help": "checkpoints of every so many steps are kept too; 0 = none"})
    async_save: bool = field(default=True, metadata={"help": "write checkpoints while training goes on"})

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every", "keep", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        for name in ("shard_size", "keep_every", "warmup_steps", "seed", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0, not {getattr(self, name)}")
        for name in ("weight_decay", "grad_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be 0 or above, not {getattr(self, name)}")
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} must lie in [0, 1), not {getattr(self, name)}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.shard_size and self.parallel != "hsdp":
            raise ValueError(f"--shard-size {self.shard_size} is for --parallel hsdp, not {self.parallel}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--lr must be above 0, not {self.lr}")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"--warmup-steps {self.warmup_steps} must be fewer than --steps {self.steps}")
        lr_factor(0, steps=self.steps, warmup_steps=0, schedule=self.lr_schedule)


_CHOICES = {"precision": PRECISIONS, "parallel": PARALLEL, "checkpoint_activations": RECOMPUTE, "compile": COMPILE}


class Objective(Protocol):
    """What a loop trains: an nn.Module whose forward(*batch, draws) gives the loss, a mean over the batch, and named
    scalar tensors to log.

    draws (B,) float32: one uniform number in [0, 1) for each sample, the same whatever the number of processes and
    micro-batches; random choices per sample follow from it.
    """

    def __call__(self, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]: ...

    def blocks(self) -> list[nn.Module]:
        """The blocks that are compiled, recomputed and sharded one by one; may be empty."""

    def after_step(self, step: int, world: World) -> None:
        """Called after each optimizer step, e.g. to look after codebooks."""


class Watcher(Protocol):
    """Looks at the run after a step, on every process."""

    def __call__(self, step: int, weights: Callable[[], dict[str, Tensor]]) -> dict[str, float]:
        """Numbers to log; none at most steps.

        weights(): the state to pass on (averaged if there is an EMA); all processes must call it together.
        """


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
    on_start: Callable[[list[dict[str, Any]]], None] | None = None,
    watchers: Sequence[Watcher] = (),
    figures: Callable[[float], dict[str, float]] | None = None,
) -> None:
    """Train `objective` until `config.steps`, from the checkpoint that `resume` means (see find_checkpoint).

    dataset: takes (index, draw) to a tuple of tensors; see step_batches for the order.
    meta: JSON that identifies the run; a checkpoint made with another one is refused. Settings that may change on the
    way (see training.resuming) are told on stderr and kept in the checkpoints.
    on_save(state, step): called on the main process with each checkpoint, with the whole weights to pass on (averaged
    ones if there is an EMA); not with that of a run that was asked to stop, which may have seconds left.
    on_start(changes): called once on the main process when the run is known to be sound, before its first step, with
    all changes of settings on the way there.
    watchers: called in turn on every process after every step, but not after the last one before a stop.
    figures(images per second): more numbers that follow from the rate, for the log.
    Raises FloatingPointError, on all processes, when a loss or the gradient norm is not finite: the weights are not
    spoiled by it. Raises OSError when the last checkpoint cannot be written; for an earlier one, a line on stderr says
    so and training goes on. Raises ValueError when the device has too little memory. Raises KeyboardInterrupt on SIGINT
    or SIGTERM, after a checkpoint of the last full step.
    """
    meta = {**meta, "loop": {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}}
    if world.share(config.batch_size) % config.accumulate:
        raise ValueError(
            f"--accumulate {config.accumulate} does not divide the {world.share(config.batch_size)} pictures of a "
            f"process (--batch-size {config.batch_size} over {world.size} processes)"
        )
    if world.size == 1 and config.parallel in ("fsdp", "hsdp"):
        tell(f"--parallel {config.parallel}: one process holds the whole model, nothing is sharded")
    on_cuda = world.device.type == "cuda"
    if not on_cuda:
        keep_freed_memory()
    set_float32_products(config.precision)
    blocks = objective.blocks()
    wrap_blocks(blocks, config.checkpoint_activations, config.compile == "on" or (config.compile == "auto" and on_cuda))
    memory_advice = (
        f"training {world.share(config.batch_size) // config.accumulate} pictures at once on each device: raise "
        "--accumulate, use --checkpoint-activations selective or full, or a smaller --batch-size; --parallel fsdp "
        "shares the model out over the devices"
    )
    with explained_memory(memory_advice):
        model = ParallelModule(
            objective.train(),
            world,
            parallel=config.parallel,
            shard_size=config.shard_size,
            bf16=config.precision == "bf16",
            blocks=blocks,
        )
    optimizer = torch.optim.AdamW(
        decay_groups(objective, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=on_cuda,
    )
    ema = EMA(objective, config.ema) if config.ema else None
    parameters = [p for p in objective.parameters() if p.requires_grad]

    step = 0
    changes: list[dict[str, Any]] = []
    found = world.share_outcome(lambda: find_checkpoint(out, resume))
    if found is not None:
        changes = world.share_outcome(lambda: changed_settings(found, meta))
        for change in changes if world.is_main else ():
            tell(told_change(change))
        changes = [*earlier_changes(found), *changes]
        state = _run_state(objective, optimizer, ema)
        load_checkpoint(found, state)
        set_model_state_dict(objective, state["model"])
        set_optimizer_state_dict(objective, optimizer, state["optimizer"])
        step = int(read_meta(found)["step"])
        world.share_outcome(lambda: check_newest(out, found))
    elif resume == "none" and world.share_outcome(lambda: find_checkpoint(out, "auto")) is not None:
        raise ValueError(f"{out} already holds a run: continue it with --resume auto, or give another --out")

    checkpoints = Checkpoints(
        out,
        {**meta, CHANGES: changes},
        world,
        keep=config.keep,
        keep_every=config.keep_every,
        background=config.async_save,
    )
    if world.is_main:
        clear_unfinished(out)
        if on_start:
            on_start(changes)
    log = TrainingLog(out, step, config.steps, config.batch_size, figures) if world.is_main else None
    agreement = Agreement(world)
    saved_step, passed_step = step, -1

    def weights() -> dict[str, Tensor]:
        return gather_state(ema.state if ema else get_model_state_dict(objective), world)

    def pass_on() -> None:
        nonlocal passed_step
        passed_step = step
        state = weights()
        failure = ""
        if world.is_main:
            try:
                on_save(state, step)
            except (OSError, SafetensorError) as error:
                failure = f"the model of step {step} could not be written: {error}"
        if world.any(bool(failure)) and step == config.steps:
            raise OSError(failure or "the main process could not write the model")
        if failure:
            tell(failure)

    def save() -> None:
        nonlocal saved_step
        saved_step = step
        agreement.settle()
        _share_buffers(objective, ema, world)
        checkpoints.save(step, _run_state(objective, optimizer, ema))

    sums: dict[str, Tensor] = {}
    summed = 0
    source = step_batches(
        dataset,
        global_batch=config.batch_size,
        first_step=step,
        steps=config.steps,
        seed=config.seed,
        workers=config.workers,
        world=world,
    )
    with stop_signals() as stop, explained_memory(memory_advice):
        try:
            while step < config.steps and not agreement.stop:
                factor = lr_factor(
                    step, steps=config.steps, warmup_steps=config.warmup_steps, schedule=config.lr_schedule
                )
                for group in optimizer.param_groups:
                    group["lr"] = config.lr * factor
                batch = (*next(source), sample_draws(config.seed, step, config.batch_size, world))
                seed_step(config.seed, step, world.rank)

                loss, scalars = forward_backward(model, batch, config.accumulate)
                norm = clip_gradients(parameters, config.grad_clip)
                skip = agreement.exchange(step, loss, norm, stop.requested)
                if on_cuda:
                    optimizer.found_inf = skip
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
                    means = world.mean(torch.stack([total.float() for total in sums.values()]) / summed).tolist()
                    if log:
                        figures_now = {**dict(zip(sums, means, strict=True)), "lr": config.lr * factor}
                        log.write(step, {**figures_now, "memory_gb": peak_bytes(world.device) / 1e9})
                    sums, summed = {}, 0
                for watch in () if agreement.stop else watchers:
                    seen = watch(step, weights)
                    if seen and log:
                        log.record(step, seen)
                if step % config.save_every == 0 or step == config.steps:
                    save()
                    if not agreement.stop:
                        pass_on()
            agreement.settle()
            if saved_step != step:
                save()
            checkpoints.settle()
            if checkpoints.failure:
                raise OSError(checkpoints.failure)
            if step < config.steps:
                raise KeyboardInterrupt
            if passed_step != step:
                # A stop, or a kill before this start, came between the last checkpoint and its model.
                pass_on()
        finally:
            source.close()
            checkpoints.close()
            if log:
                log.close()


def forward_backward(
    model: ParallelModule, batch: tuple[Tensor, ...], accumulate: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients of the mean loss over `batch`, in `accumulate` equal parts one after the other; returns that loss and
    the means of what the objective logs.

    Gradients are exchanged once, with the last part.
    """
    device = model.world.device
    parts = zip(*(t.to(device, non_blocking=True).chunk(accumulate) for t in batch), strict=True)
    mean, means = torch.zeros((), device=device), {}
    for number, part in enumerate(parts, start=1):
        with model.micro_batch(last=number == accumulate):
            loss, scalars = model(*part)
            (loss / accumulate).backward()
        mean = mean + loss.detach() / accumulate
        for name, value in scalars.items():
            means[name] = means.get(name, 0) + value.detach() / accumulate
    return mean, means


def sample_draws(seed: int, step: int, global_batch: int, world: World) -> Tensor:
    """Uniform numbers in [0, 1), float32, for this process's samples of a step's global batch.

    They follow from the seed, the step and the sample's place in the batch, not from the number of processes.
    """
    share = world.share(global_batch)
    draws = np.random.default_rng([seed, 2, step]).random(global_batch, dtype=np.float32)
    return torch.from_numpy(draws[world.rank * share : (world.rank + 1) * share])


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's global generators for one step of one process: dropout inside the model follows from these three."""
    mixed = torch.tensor([seed, step, rank], dtype=torch.int64)
    factors = torch.tensor([6364136223846793005, 1442695040888963407, 3935559000370003845], dtype=torch.int64)
    torch.manual_seed(int((mixed + 1).mul(factors).sum()) & (2**63 - 1))


def _share_buffers(objective: nn.Module, ema: EMA | None, world: World) -> None:
    """Give all processes the main one's buffers: a checkpoint then holds one value of each."""
    for name, buffer in objective.named_buffers():
        world.broadcast(buffer)
        if ema and name in ema.state:
            ema.state[name].copy_(buffer)


def _run_state(objective: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None) -> dict[str, Any]:
    state: dict[str, Any] = {
        "model": get_model_state_dict(objective),
        "optimizer": get_optimizer_state_dict(objective, optimizer),
    }
    if ema:
        state["ema"] = ema.state
    return state
