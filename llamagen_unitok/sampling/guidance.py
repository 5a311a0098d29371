"""Classifier-free guidance: its strength at each position, and the mix of the two logits."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

# How much of the guidance acts at t = position / L, in [0, 1). To add a schedule, add a row.
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda t, power: 1.0,
    "linear": lambda t, power: t,
    "cosine": lambda t, power: (1 - math.cos(math.pi * t)) / 2,
    "power-cosine": lambda t, power: (1 - math.cos(math.pi * t**power)) / 2,
}


def guidance_scales(
    num_positions: int, scale: float, schedule: str = "constant", power: float = 1.0, interval: int | None = None
) -> list[float]:
    """The scale s(p) = 1 + (scale - 1)·f(p / L) at each of `num_positions` positions; 1 means no guidance.

    interval: n guides positions 0 to n + 1 and no later one. The published counter starts at the second token, and
    that meaning is kept, so that published settings give published pictures.
    """
    weight = SCHEDULES[schedule]
    return [
        1 + (scale - 1) * weight(position / num_positions, power)
        if interval is None or position <= interval + 1
        else 1.0
        for position in range(num_positions)
    ]


def guide(logits: Tensor, batch: int, scale: float) -> Tensor:
    """Conditional rows first, then, where there are any, as many unconditional ones: (B or 2B, V) → (B, V).

    uncond + scale · (cond - uncond); a scale of 1 takes the conditional logits as they are.
    """
    conditional = logits[:batch]
    if scale == 1 or logits.shape[0] == batch:
        return conditional
    unconditional = logits[batch:]
    return unconditional + scale * (conditional - unconditional)
