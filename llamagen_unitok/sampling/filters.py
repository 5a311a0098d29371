"""From logits to a code: temperature, then top-k, then top-p, then a draw from a given uniform. All in float32."""

from __future__ import annotations

import torch
from torch import Tensor

# Published code divides by no less; below it float32 logits overflow.
MIN_TEMPERATURE = 1e-5


def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Scale logits (B, V), and set those not kept to -inf; returns float32.

    top_k: keep the k largest and all that tie with the k-th; 0 = all.
    top_p: of what top_k left, keep the most probable until their sum exceeds top_p, the one that passes it included;
        1.0 = all.
    """
    logits = logits.float() / max(temperature, MIN_TEMPERATURE)
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        passed = ordered.softmax(dim=-1).cumsum(dim=-1) > top_p
        passed_before = passed.roll(1, dims=-1)
        passed_before[..., 0] = False
        logits = logits.masked_fill(passed_before.scatter(-1, order, passed_before), -torch.inf)
    return logits


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distribution: probs (B, V) float32, uniforms (B,) in [0, 1) → (B,) int64.

    Takes, in vocabulary order, the first entry whose cumulative probability exceeds the uniform, clamped to the last
    entry with probability above 0, since rounding can leave the sum below 1.
    """
    vocabulary = probs.shape[-1]
    entries = torch.arange(vocabulary, device=probs.device)
    exceeds = probs.cumsum(dim=-1) > uniforms[:, None]
    first = torch.where(exceeds, entries, vocabulary).amin(dim=-1)
    last = torch.where(probs > 0, entries, 0).amax(dim=-1)
    return torch.minimum(first, last)


def choose(logits: Tensor, uniforms: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Filter logits (B, V) and draw one entry per row, (B,) int64; temperature 0 takes the largest logit."""
    if temperature == 0:
        return logits.float().argmax(dim=-1)
    return draw(filter_logits(logits, temperature, top_k, top_p).softmax(dim=-1), uniforms)
