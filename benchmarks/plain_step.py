"""The training step written plainly: the same model and arithmetic types, without what makes ours fast.

Norms, attention and the loss in separate operations, a float32 copy of the logits, one table after the other, weights
updated one by one, and the loss read back at every step, as published training code has it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen_unitok import GPT
from llamagen_unitok.layers import Block, RMSNorm
from llamagen_unitok.runtime.optim import decay_groups


class PlainStep:
    """Owns an optimizer over the weights of `gpt`; calling it does one step and returns the loss as a number."""

    def __init__(self, gpt: GPT, dtype: torch.dtype, lr: float = 1e-4) -> None:
        self.gpt, self.dtype = gpt, dtype
        self.optimizer = torch.optim.AdamW(decay_groups(gpt, weight_decay=0.05), lr=lr, foreach=False, fused=False)

    def __call__(self, labels: Tensor, codes: Tensor) -> float:
        loss = self.loss(labels, codes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.gpt.parameters(), 1.0, foreach=False)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def loss(self, labels: Tensor, codes: Tensor) -> Tensor:
        """Mean cross-entropy of labels (B,), codes (B, L, K)."""
        gpt = self.gpt
        with torch.autocast(labels.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            tables = gpt.tok_embeddings.codebooks
            tokens = torch.stack([table(codes[:, :-1, k]) for k, table in enumerate(tables)]).sum(0)
            x = gpt.dropout(torch.cat((gpt.cls_embedding(labels)[:, None], tokens), dim=1))
            for block in gpt.layers:
                x = self._block(block, x, gpt.rope.table[: x.shape[1]])
            head = gpt.output
            steps = [self._norm(gpt.norm, x), *(table(codes[..., k]) for k, table in enumerate(head.codebooks))]
            y = torch.stack(steps, dim=2).flatten(0, 1)  # (B·L, K, C)
            for block in head.layers:
                y = self._block(block, y, None)
            logits = head.linear_head(self._norm(head.norm, y))
        return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())

    def _block(self, block: Block, x: Tensor, rope: Tensor | None) -> Tensor:
        attention, ffn = block.attention, block.feed_forward
        heads, size = attention.heads, x.shape[-1] // attention.heads
        qkv = attention.wqkv(self._norm(block.attention_norm, x))
        q, k, v = qkv.split((heads * size, attention.kv_heads * size, attention.kv_heads * size), dim=-1)
        q, k, v = (part.unflatten(-1, (-1, size)) for part in (q, k, v))  # (B, T, H, D)
        if rope is not None:
            q, k = self._rotate(q, rope), self._rotate(k, rope)
        k, v = (part.repeat_interleave(heads // attention.kv_heads, dim=2) for part in (k, v))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(-2, -1) / size**0.5
        ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        y = scores.masked_fill(ahead, float("-inf")).softmax(-1).to(v.dtype) @ v
        x = x + attention.dropout(attention.wo(y.transpose(1, 2).flatten(-2)))
        h = self._norm(block.ffn_norm, x)
        return x + ffn.dropout(ffn.w2(F.silu(ffn.w1(h)) * ffn.w3(h)))

    @staticmethod
    def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
        full = x.float()
        return (full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + norm.eps)).type_as(x) * norm.weight

    @staticmethod
    def _rotate(x: Tensor, rope: Tensor) -> Tensor:
        pairs = x.float().unflatten(-1, (-1, 2))
        cos, sin = rope[:, None, :, 0], rope[:, None, :, 1]
        even, odd = pairs[..., 0], pairs[..., 1]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).type_as(x)
