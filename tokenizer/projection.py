"""Token factorization: from the token width to the quantized channels and back (UniTok, section 3.3).

Norms inside have epsilon 1e-5, but 1e-6 in the feed-forward part's own norm, as in the published weights.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from tokenizer.config import UniTokConfig


class ProjectionAttention(nn.Module):
    """Self-attention whose heads are averaged on the way to fewer channels and concatenated on the way to more.

    Every head is min(in_width, out_width) wide. Queries and values have a bias; the keys' is a constant zero that the
    published files store.
    """

    def __init__(self, in_width: int, out_width: int, causal: bool):
        super().__init__()
        wide = max(in_width, out_width)
        self.heads = wide // min(in_width, out_width)
        self.average_heads = in_width > out_width
        self.causal = causal
        self.qkv = nn.Linear(in_width, 3 * wide, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(wide))
        self.v_bias = nn.Parameter(torch.zeros(wide))
        self.register_buffer("zero_k_bias", torch.zeros(wide))
        self.proj = nn.Linear(out_width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)  # (B, L, 3·wide)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, L, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        y = y.mean(dim=1) if self.average_heads else y.transpose(1, 2).flatten(2)
        return self.proj(y)  # (B, L, out_width)


class AttnProjection(nn.Module):
    """y = proj(norm3 x) + attn(norm1 x); y + mlp(norm2 y). (B, L, in_width) → (B, L, out_width)."""

    def __init__(self, in_width: int, out_width: int, causal: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(in_width)
        self.attn = ProjectionAttention(in_width, out_width, causal)
        self.norm3 = nn.LayerNorm(in_width)
        self.proj = nn.Linear(in_width, out_width)
        self.norm2 = nn.LayerNorm(out_width)
        self.mlp = GeGluMlp(out_width, 2 * out_width, act_layer="gelu_tanh")

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(self.norm3(x)) + self.attn(self.norm1(x))
        return y + self.mlp(self.norm2(y))


def build_projections(config: UniTokConfig) -> tuple[nn.Module, nn.Module]:
    """(down, up): width → latent_width before the quantizer, and back after it."""
    build = {
        "attn": partial(AttnProjection, causal=config.causal_projection),
        "linear": nn.Linear,
    }[config.projection]
    return build(config.width, config.latent_width), build(config.latent_width, config.width)
