"""Guidance, filters and draw as one GPU kernel without a sort: a row of logits a program, from logits to a code.

filters.py says what is kept and drawn; here top-k and top-p find the smallest kept logit bit by bit, in 32 rounds of
counting what is above (FlashInfer's sort-free sampling, arXiv 2501.01005, rejects in place of counting). Sums are added
in another order than there, so an entry whose cumulative probability is within rounding of top_p, or of the uniform,
can fall on the other side. Triton is optional: importing this file without it raises ImportError.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llamagen_unitok.sampling.filters import MIN_TEMPERATURE

LARGEST_VOCABULARY = 32768  # a row stays in one program's registers


@triton.jit(do_not_specialize=["batch", "codebook", "top_k"])
def choose_kernel(
    logits_ptr,  # (B or 2B, V): conditional rows, then unconditional ones
    uniforms_ptr,  # (B, L, K) float32
    scales_ptr,  # (L,) float32
    position_ptr,  # (1,) int64
    finite_ptr,  # () bool, set to False where a logit is not finite
    chosen_ptr,  # (B,) int64, written
    batch,
    vocabulary,
    uniforms_batch_stride,
    uniforms_position_stride,
    codebook,
    temperature,
    top_k,
    top_p,
    GUIDED: tl.constexpr,
    GREEDY: tl.constexpr,
    SCALED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    CHECKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    entries = tl.arange(0, BLOCK)
    inside = entries < vocabulary
    position = tl.load(position_ptr)
    x = tl.load(logits_ptr + row * vocabulary + entries, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        scale = tl.load(scales_ptr + position)
        other = tl.load(logits_ptr + (row + batch) * vocabulary + entries, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(scale == 1.0, x, other + scale * (x - other))
    if CHECKED:
        # x - x is 0 for finite numbers only. All programs that store here store the same.
        wrong = tl.sum(tl.where(inside & (x - x != 0.0), 1, 0))
        tl.store(finite_ptr, False, mask=wrong > 0)
    if SCALED:
        x = tl.math.div_rn(x, temperature)
    x = tl.where(inside, x, -float("inf"))
    largest = tl.max(x)
    if GREEDY:
        chosen = tl.min(tl.where(x == largest, entries, vocabulary))
    else:
        # Whole numbers in the order of the logits; zeros of both signs are one.
        bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
        keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        kept = inside
        if TOP_K:
            # The largest number that at least top_k keys reach.
            border = tl.where(tl.sum(tl.where(inside & (keys >= 0), 1, 0)) >= top_k, 0, -2147483648)
            for step in range(31):
                higher = border + (1 << (30 - step))
                border = tl.where(tl.sum(tl.where(inside & (keys >= higher), 1, 0)) >= top_k, higher, border)
            kept = inside & (keys >= border)
        weights = tl.where(kept, tl.exp(x - largest), 0.0)
        if TOP_P:
            # The largest number above which, it included, more than top_p of the probability is.
            probs = weights / tl.sum(weights)
            border = tl.where(tl.sum(tl.where(keys >= 0, probs, 0.0)) > top_p, 0, -2147483648)
            for step in range(31):
                higher = border + (1 << (30 - step))
                border = tl.where(tl.sum(tl.where(keys >= higher, probs, 0.0)) > top_p, higher, border)
            # Of entries that tie there, as many as it takes, those that come first in the vocabulary.
            above = tl.sum(tl.where(keys > border, probs, 0.0))
            ties = kept & (keys == border)
            each = tl.max(tl.where(ties, probs, 0.0))
            rank = tl.cumsum(tl.where(ties, 1, 0))
            enough = above + (rank - 1).to(tl.float32) * each > top_p
            kept = kept & ((keys > border) | (ties & ((rank == 1) | (enough == 0))))
            weights = tl.where(kept, weights, 0.0)
        probs = weights / tl.sum(weights)
        uniform = tl.load(uniforms_ptr + row * uniforms_batch_stride + position * uniforms_position_stride + codebook)
        first = tl.min(tl.where(tl.cumsum(probs) > uniform, entries, vocabulary))
        last = tl.max(tl.where(probs > 0.0, entries, 0))
        chosen = tl.minimum(first, last)
    tl.store(chosen_ptr + row, chosen.to(tl.int64))


def guided_choice(
    logits: Tensor,
    uniforms: Tensor,
    scales: Tensor,
    position: Tensor,
    finite: Tensor,
    codebook: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Tensor:
    """Logits (B or 2B, V), conditional rows first → codes (B,) int64; nothing waits for the device.

    uniforms: (B, L, K) float32.   scales: (L,) float32, what guides 2B rows.   position: (1,) int64.   finite: () bool,
    which becomes False where the first codebook's guided logits are not finite.
    """
    batch, vocabulary = len(uniforms), logits.shape[-1]
    block = triton.next_power_of_2(vocabulary)
    chosen = torch.empty(batch, dtype=torch.int64, device=logits.device)
    choose_kernel[(batch,)](
        logits.contiguous(),
        uniforms,
        scales,
        position,
        finite,
        chosen,
        batch,
        vocabulary,
        uniforms.stride(0),
        uniforms.stride(1),
        codebook,
        max(float(temperature), MIN_TEMPERATURE),
        top_k,
        float(top_p),
        GUIDED=len(logits) > batch,
        GREEDY=temperature == 0,
        SCALED=temperature not in (0, 1),
        TOP_K=0 < top_k < vocabulary,
        TOP_P=top_p < 1,
        CHECKED=codebook == 0,
        BLOCK=block,
        num_warps=min(16, max(4, block // 512)),
    )
    return chosen
