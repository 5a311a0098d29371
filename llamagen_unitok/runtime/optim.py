"""Optimizer groups, learning-rate schedules, and the moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llamagen_unitok.runtime.parallel import local


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW parameter groups: matrices, kernels and tables decay; vectors (gains, biases) and codebooks do not.

    Every trainable parameter is in exactly one group.
    """
    decayed, free = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (free if parameter.ndim < 2 or ".codebook." in name else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


# Factor on the peak learning rate after warm-up; t in [0, 1] is the share of the remaining steps that is done.
LR_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "linear": lambda t: 1 - t,
    "constant": lambda t: 1.0,
}


def lr_factor(step: int, *, steps: int, warmup_steps: int, schedule: str) -> float:
    """Factor on the peak learning rate at `step` (0 … steps − 1): linear warm-up, then the named schedule."""
    if schedule not in LR_SCHEDULES:
        raise ValueError(f"unknown learning-rate schedule {schedule!r}: known are {', '.join(LR_SCHEDULES)}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return LR_SCHEDULES[schedule]((step - warmup_steps) / max(1, steps - warmup_steps))


class EMA:
    """Exponential moving average of a module's parameters, in their own precision.

    The decay grows with the step as min(decay, (1 + step) / (10 + step)), so early weights are forgotten quickly.
    Buffers are copied, not averaged. Of a sharded module each process averages its own part; `state` holds the same
    DTensors as the module's state dict then.
    """

    def __init__(self, module: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"--ema must lie in [0, 1), not {decay}")
        self.decay = decay
        self.state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        self._parameters = [name for name, _ in module.named_parameters()]
        self._buffers = sorted(self.state.keys() - set(self._parameters))

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards `module` after optimizer step number `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = dict(module.named_parameters())
        averaged = [local(self.state[name]) for name in self._parameters]
        torch._foreach_lerp_(averaged, [local(current[name]) for name in self._parameters], 1 - decay)
        rest = module.state_dict() if self._buffers else {}
        for name in self._buffers:
            self.state[name].copy_(rest[name])


@torch.no_grad()
def clip_gradients(parameters: list[Tensor], max_norm: float) -> Tensor:
    """Scale gradients to a total norm of at most `max_norm` (0 = leave them); returns the norm before, a tensor.

    Gradients may be sharded: the norm is that of the whole. Nothing is read back to the host, so a GPU is not held up.
    """
    norm = nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf, foreach=True)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
