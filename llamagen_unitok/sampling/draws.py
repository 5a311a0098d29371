"""The draw as decoding uses it: the entries that filters.py chooses, in fewer and cheaper steps where there are any."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from llamagen_unitok.sampling.filters import MIN_TEMPERATURE, choose


@dataclass(frozen=True)
class Draw:
    """Chooses codes from guided logits (B, V). uniforms: (B, L, K) float32 on its device; the rest: SamplingConfig."""

    uniforms: Tensor
    temperature: float
    top_k: int
    top_p: float

    def over(self, uniforms: Tensor) -> Draw:
        """The same draw from other uniforms."""
        return replace(self, uniforms=uniforms)

    def __call__(self, logits: Tensor, position: int | Tensor, codebook: int) -> Tensor:
        """Codes (B,) int64. position: a number, or (1,) int64 on the device, which keeps the host out of it."""
        if isinstance(position, Tensor):
            uniforms = self.uniforms[:, :, codebook].index_select(1, position)[:, 0]
            return choose(logits, uniforms, self.temperature, self.top_k, self.top_p)
        uniforms = self.uniforms[:, position, codebook]
        pick = choose_on_cpu if logits.device.type == "cpu" else choose
        return pick(logits, uniforms, self.temperature, self.top_k, self.top_p)


def choose_on_cpu(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """What `filters.choose` gives, bit for bit, for logits (B, V) on the CPU.

    Filters need the sorted values, not the order: numpy sorts numbers with vector instructions, many times faster than
    torch sorts with indices. The running sum of a CPU never falls, so the draw is a binary search in it.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(dim=-1)
    if temperature != 1:
        logits = logits / max(temperature, MIN_TEMPERATURE)
    if 0 < top_k < logits.shape[-1] or top_p < 1:
        logits = _filtered(logits, top_k, top_p)
    probs = logits.softmax(dim=-1)
    entries = torch.searchsorted(probs.cumsum(dim=-1), uniforms[:, None].contiguous(), right=True)[:, 0]
    if (entries == probs.shape[-1]).any():
        last = torch.where(probs > 0, torch.arange(probs.shape[-1]), 0).amax(dim=-1)
        entries = torch.minimum(entries, last)
    return entries


def _filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits with those not kept at -inf, as `filters.filter_logits` does after its temperature."""
    ordered = torch.from_numpy(np.sort(logits.numpy(), axis=-1)).flip(-1)  # (B, V), largest first
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = ordered[:, top_k - 1, None]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
        ordered = ordered.masked_fill(ordered < smallest_kept, -torch.inf)
    if top_p < 1:
        passed = ordered.softmax(dim=-1).cumsum(dim=-1) > top_p
        kept = (~passed).sum(dim=-1, keepdim=True) + 1  # the one that passes is kept
        smallest_kept = ordered.gather(-1, kept.clamp_max(ordered.shape[-1]) - 1)
        ties = logits == smallest_kept
        # Of entries that tie at the border, those that come first in the vocabulary are kept.
        ties_kept = kept - (logits > smallest_kept).sum(dim=-1, keepdim=True)
        beyond = ties & (ties.cumsum(dim=-1) > ties_kept)
        logits = logits.masked_fill((logits < smallest_kept) | beyond, -torch.inf)
    return logits
