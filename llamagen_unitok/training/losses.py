"""Terms of the tokenizer's loss. A new term is one function and one row of the table.

A term takes the training pass and the original images, (B, 3, H, W) in [-1, 1], and returns a scalar.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from tokenizer.unitok import Reconstruction

TOKENIZER_TERMS: dict[str, Callable[[Reconstruction, Tensor], Tensor]] = {
    "l1": lambda result, images: F.l1_loss(result.images, images),
    "l2": lambda result, images: F.mse_loss(result.images, images),
    "vq": lambda result, images: result.vq_loss,  # codebook and commitment
}


def weighted_sum(weights: dict[str, float], result: Reconstruction, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, each term before its weight) for the terms with a weight above 0. ValueError for an unknown term."""
    unknown = weights.keys() - TOKENIZER_TERMS.keys()
    if unknown:
        raise ValueError(f"unknown loss terms {sorted(unknown)}: known are {', '.join(TOKENIZER_TERMS)}")
    terms = {name: TOKENIZER_TERMS[name](result, images) for name, weight in weights.items() if weight > 0}
    return sum(weights[name] * value for name, value in terms.items()), terms
