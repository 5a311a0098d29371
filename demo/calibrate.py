"""Temperature scaling of a generator (Guo et al., arXiv 1706.04599): the logits' scale of least loss on training codes.

A generator that learns its pictures by heart ends a short training under-confident: dividing its logits by less than 1
lowers its loss on the same pictures. The factor goes into the output layer: temperature 1 is then the calibrated one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen_unitok.evaluation.sweep import golden_section
from llamagen_unitok.gpt import GPT
from llamagen_unitok.training.data import CodeShards

PICTURES = 120
BATCH = 20
RANGE = (0.4, 1.4)
STEPS = 12


@torch.inference_mode()
def calibrate(gpt: GPT, codes: Path, pictures: int = PICTURES) -> tuple[float, float, float]:
    """Scale the output layer of `gpt` in place; returns (temperature, loss before, loss after), losses in nats a code.

    The loss is that of `pictures` training pictures, evenly spread, under their own labels.
    """
    shards = CodeShards(codes)
    rows = [shards[i * len(shards) // pictures, 0] for i in range(min(pictures, len(shards)))]
    labels = torch.tensor([label for label, _ in rows])
    targets = torch.from_numpy(np.stack([row for _, row in rows]))
    # Half precision: 120 pictures of 512 codes are 63 million logits.
    logits = [
        gpt(label, target).half() for label, target in zip(labels.split(BATCH), targets.split(BATCH), strict=True)
    ]

    def loss(temperature: float) -> float:
        return float(
            np.mean(
                [_loss(part, target, temperature) for part, target in zip(logits, targets.split(BATCH), strict=True)]
            )
        )

    *_, temperature = golden_section(loss, *RANGE, STEPS)
    before, after = loss(1.0), loss(temperature)
    head = gpt.output.linear_head
    head.weight.div_(temperature)
    head.bias.div_(temperature)
    return temperature, before, after


def _loss(logits: Tensor, targets: Tensor, temperature: float) -> float:
    return F.cross_entropy(logits.float().flatten(0, 2) / temperature, targets.flatten()).item()
