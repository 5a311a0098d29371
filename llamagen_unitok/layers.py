"""The parts of a Llama-style block: norm, attention with an explicit cache, feed-forward.

Attribute names mirror the published state-dict keys: attention.wqkv, attention.wo, feed_forward.w1/w2/w3,
attention_norm, ffn_norm. Shapes: B batch, T sequence, C width, H heads, D head width.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen_unitok.config import GPTConfig
from llamagen_unitok.rope import rotate


class LayerCache(NamedTuple):
    """One layer's share of a KVCache: where to write now, and all that may be attended to."""

    keys: Tensor  # (B, kv_heads, length, D), the first `start` filled
    values: Tensor
    start: int

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:
        """Write k, v (B, kv_heads, T, D) at `start`; returns views of everything filled so far, and no mask."""
        end = self.start + k.shape[2]
        assert end <= self.keys.shape[2], f"cache of {self.keys.shape[2]} positions has no room for position {end - 1}"
        self.keys[:, :, self.start : end] = k
        self.values[:, :, self.start : end] = v
        return self.keys[:, :, :end], self.values[:, :, :end], None


class FixedLayerCache(NamedTuple):
    """One layer's cache for steps of fixed shapes: the position is a tensor, and a mask hides what is ahead."""

    keys: Tensor  # (B, kv_heads, length, D)
    values: Tensor
    position: Tensor  # (1,) int64
    mask: Tensor  # (1, length) bool, True up to and with the position

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write k, v (B, kv_heads, 1, D) at the position; returns everything, and the mask."""
        self.keys.index_copy_(2, self.position, k)
        self.values.index_copy_(2, self.position, v)
        return self.keys, self.values, self.mask


class KVCache:
    """Keys and values of a stack of layers, allocated once and written in place.

    `filled` counts the positions that hold something; whoever runs the layers advances it after the last one.
    """

    def __init__(self, layers: int, batch: int, length: int, config: GPTConfig, like: Tensor) -> None:
        shape = (layers, batch, config.kv_heads, length, config.head_width)
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)
        self.filled = 0

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self.keys[index], self.values[index], self.filled)

    def first_rows(self, batch: int) -> KVCache:
        """The first `batch` rows of the batch, as a view that counts `filled` for itself from here."""
        view = copy.copy(self)
        view.keys, view.values = self.keys[:, :batch], self.values[:, :batch]
        return view


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis: normalised in float32, cast back, then multiplied by the gain."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Causal self-attention with optional grouped-query heads; `wqkv` stacks queries, keys and values."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.wqkv = nn.Linear(config.width, (self.heads + 2 * self.kv_heads) * config.head_width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_width, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_width, config.norm_eps) if config.qk_norm else None
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, cache: LayerCache | FixedLayerCache | None = None
    ) -> Tensor:
        """x (B, T, C), rope (T, D/2, 2) or None → (B, T, C).

        With a cache, x continues the positions in it: one at a time, or any number into an empty cache.
        """
        qkv = self.wqkv(x).unflatten(-1, (self.heads + 2 * self.kv_heads, -1))  # (B, T, H + 2 kv, D)
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        if self.q_norm is not None:
            q, k = qk.split((self.heads, self.kv_heads), dim=2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        if rope is not None:
            qk = rotate(qk, rope)
        q, k = qk.transpose(1, 2).split((self.heads, self.kv_heads), dim=1)  # (B, H, T, D)
        v = v.transpose(1, 2)
        mask = None
        if cache is not None:
            assert x.shape[1] == 1 or cache.start == 0, "several positions fit only into an empty cache"
            k, v, mask = cache.append(k, v)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=x.shape[1] > 1, enable_gqa=self.kv_heads != self.heads
        )  # (B, H, T, D)
        return self.dropout(self.wo(y.transpose(1, 2).flatten(-2)))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.width, config.ffn_width, bias=False)
        self.w3 = nn.Linear(config.width, config.ffn_width, bias=False)
        self.w2 = nn.Linear(config.ffn_width, config.width, bias=False)
        self.dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """Pre-norm transformer block; the trunk's have rotary positions, the depth head's have none."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, cache: LayerCache | FixedLayerCache | None = None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, cache)
        return x + self.feed_forward(self.ffn_norm(x))
