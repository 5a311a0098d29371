"""What plain PyTorch takes several GPU kernels for in a step of fixed shape, as one each. Triton is optional: importing
this file without it raises ImportError.

Attention: rotation, writing of keys and values, and attention up to the position, which is read on the device.

Choice: guidance, filters and draw without a sort, a row of logits a program, from logits to a code.
filters.py says what is kept and drawn; here top-k and top-p find the smallest kept logit bit by bit, in 32 rounds of
counting what is above (FlashInfer's sort-free sampling, arXiv 2501.01005, rejects in place of counting). Sums are added
in another order than there, so an entry whose cumulative probability is within rounding of top_p, or of the uniform,
can fall on the other side.
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


@triton.jit
def _turned(pointer, d, inside, turns_ptr, TURNING: tl.constexpr):
    """Channels d of a head, turned by one position's table (D/2, 2), in float32."""
    x = tl.load(pointer + d, mask=inside, other=0.0).to(tl.float32)
    if TURNING:
        partner = tl.load(pointer + (d ^ 1), mask=inside, other=0.0).to(tl.float32)
        cosine = tl.load(turns_ptr + (d // 2) * 2, mask=inside, other=0.0)
        sine = tl.load(turns_ptr + (d // 2) * 2 + 1, mask=inside, other=0.0)
        x = x * cosine + tl.where(d % 2 == 0, -partner, partner) * sine
    return x


@triton.jit
def attend_kernel(
    qkv_ptr,  # (rows, H + 2 kv, D) before turning; (rows, 2 kv, D) without QUERIES
    cache_ptr,  # (rows, 2 kv, length, D), keys before values, filled before the position; the position is written
    turns_ptr,  # (length + 1, D/2, 2) float32
    position_ptr,  # (1,) int64
    y_ptr,  # (rows, H, D), written
    heads,
    kv_heads,
    cache_row_stride,
    cache_head_stride,
    scale,
    QUERIES: tl.constexpr,
    TURNING: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = heads // kv_heads
    kv_head = head // group
    position = tl.load(position_ptr).to(tl.int32)
    d = tl.arange(0, BLOCK_D)
    inside = d < WIDTH
    turns = turns_ptr + position * WIDTH
    queries = heads if QUERIES else 0
    row_ptr = qkv_ptr + row * (queries + 2 * kv_heads) * WIDTH
    kind = cache_ptr.dtype.element_ty
    # Rounded as they are stored, so that a position sees itself as later ones will see it.
    k = _turned(row_ptr + (queries + kv_head) * WIDTH, d, inside, turns, TURNING).to(kind)
    v = tl.load(row_ptr + (queries + kv_heads + kv_head) * WIDTH + d, mask=inside, other=0.0)
    keys_ptr = cache_ptr + row * cache_row_stride + kv_head * cache_head_stride
    values_ptr = keys_ptr + kv_heads * cache_head_stride
    answer = v.to(tl.float32)
    if QUERIES:
        q = _turned(row_ptr + head * WIDTH, d, inside, turns, TURNING).to(kind).to(tl.float32) * scale
        largest = tl.sum(q * k.to(tl.float32))
        total = 1.0
        for start in range(0, position, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            before = t < position
            where = t[:, None] * WIDTH + d[None, :]
            seen = before[:, None] & inside[None, :]
            scores = tl.sum(tl.load(keys_ptr + where, mask=seen, other=0.0).to(tl.float32) * q[None, :], axis=1)
            scores = tl.where(before, scores, -float("inf"))
            larger = tl.maximum(largest, tl.max(scores))
            weights = tl.exp(scores - larger)
            shrink = tl.exp(largest - larger)
            values = tl.load(values_ptr + where, mask=seen, other=0.0).to(tl.float32)
            answer = answer * shrink + tl.sum(weights[:, None] * values, axis=0)
            total = total * shrink + tl.sum(weights)
            largest = larger
        answer = answer / total
    tl.store(y_ptr + (row * heads + head) * WIDTH + d, answer.to(kind), mask=inside)
    first = inside & (head % group == 0)
    tl.store(keys_ptr + position * WIDTH + d, k, mask=first)
    tl.store(values_ptr + position * WIDTH + d, v, mask=first)


def attend(qkv: Tensor, cache: Tensor, position: Tensor, heads: int, turns: Tensor | None) -> Tensor:
    """Queries, keys and values qkv (rows, H + 2 kv, D) of one position, not turned → attention's answer (rows, H·D).

    cache: (rows, 2 kv, length, D), keys before values, filled before the position, which is written.   position: (1,)
    int64.   turns: (length + 1, D/2, 2) float32, or None without positions.
    Where the position is 0, qkv may lack the queries, (rows, 2 kv, D): it sees only itself.
    """
    rows, _, width = qkv.shape
    kv_heads = cache.shape[1] // 2
    y = qkv.new_empty(rows, heads * width)
    attend_kernel[(rows, heads)](
        qkv.contiguous(),
        cache,
        qkv if turns is None else turns,
        position,
        y,
        heads,
        kv_heads,
        cache.stride(0),
        cache.stride(1),
        width**-0.5,
        QUERIES=qkv.shape[1] > 2 * kv_heads,
        TURNING=turns is not None,
        WIDTH=width,
        BLOCK_D=triton.next_power_of_2(width),
        BLOCK_T=min(64, triton.next_power_of_2(cache.shape[2])),
        num_warps=4,
    )
    return y
