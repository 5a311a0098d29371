"""The baseline: the published sampling loop of LlamaGen-UniTok in our own words, with its waste kept.

What users of the published code have: every position rebuilds the depth head's caches and mask, attention runs in its
plain form over the whole buffer under a mask, keys and values are copied for grouped-query heads even where there are
none, queries and keys turn in separate float32 passes, embeddings are gathered one codebook at a time and stacked, both
halves of a guided batch run to the end, probabilities are filtered by sorting and drawn by `multinomial`, all in the
weights' number type. The weights are those of the generator it is given: a ratio of times is a ratio of loops.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llamagen_unitok import GPT
from llamagen_unitok.layers import Attention, Block, RMSNorm

BUFFER_MULTIPLE = 8  # buffers are as long as the sequence, rounded up to this


def norm(module: RMSNorm, x: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + module.eps)
    return wide.type_as(x) * module.weight


def turn(x: Tensor, table: Tensor) -> Tensor:
    """x (B, 1, H, D) turned by table (1, D/2, 2)."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    table = table.view(1, pairs.size(1), 1, pairs.size(3), 2)
    turned = torch.stack(
        [
            pairs[..., 0] * table[..., 0] - pairs[..., 1] * table[..., 1],
            pairs[..., 1] * table[..., 0] + pairs[..., 0] * table[..., 1],
        ],
        dim=-1,
    )
    return turned.flatten(3).type_as(x)


class Buffers:
    """Keys and values of one layer, (B, kv_heads, length, D); made on the CPU and then moved, as published."""

    def __init__(self, attention: Attention, batch: int, length: int, like: Tensor) -> None:
        shape = (batch, attention.kv_heads, length, like.shape[0] // attention.heads)
        self.keys = torch.zeros(shape, dtype=like.dtype).to(like.device)
        self.values = torch.zeros(shape, dtype=like.dtype).to(like.device)

    def update(self, where: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[:, :, where] = k
        self.values[:, :, where] = v
        return self.keys, self.values


class Stack:
    """A stack of blocks with its buffers and its mask over the whole of them."""

    def __init__(self, layers: list[Block], batch: int, length: int, like: Tensor) -> None:
        length = -(-length // BUFFER_MULTIPLE) * BUFFER_MULTIPLE
        self.layers = layers
        self.buffers = [Buffers(layer.attention, batch, length, like) for layer in layers]
        triangle = torch.tril(torch.ones(length, length, dtype=torch.bool))
        self.mask = triangle.unsqueeze(0).repeat(batch, 1, 1).to(like.device)

    def step(self, x: Tensor, where: Tensor, table: Tensor | None) -> Tensor:
        """x (B, 1, C) at position `where` (1,) → (B, 1, C)."""
        mask = self.mask[: x.shape[0], None, where]
        for layer, buffers in zip(self.layers, self.buffers, strict=True):
            x = x + self.attend(layer.attention, norm(layer.attention_norm, x), buffers, mask, where, table)
            ffn, h = layer.feed_forward, norm(layer.ffn_norm, x)
            x = x + ffn.w2(F.silu(ffn.w1(h)) * ffn.w3(h))
        return x

    @staticmethod
    def attend(module: Attention, x: Tensor, buffers: Buffers, mask: Tensor, where: Tensor, table) -> Tensor:
        batch, length, width = x.shape
        size = width // module.heads
        kv = module.kv_heads * size
        q, k, v = module.wqkv(x).split([width, kv, kv], dim=-1)
        q = q.view(batch, length, module.heads, size)
        k, v = (t.view(batch, length, module.kv_heads, size) for t in (k, v))
        if table is not None:
            q, k = turn(q, table), turn(k, table)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        keys, values = buffers.update(where, k, v)
        repeats = module.heads // module.kv_heads
        keys, values = keys.repeat_interleave(repeats, dim=1), values.repeat_interleave(repeats, dim=1)
        with sdpa_kernel(SDPBackend.MATH):
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return module.wo(y.transpose(1, 2).contiguous().view(batch, length, width))


def pick(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Logits (B, V), changed in place where filtered → codes (B, 1), from the global random generator."""
    logits = logits / max(temperature, 1e-5)
    if top_k > 0:
        smallest = torch.topk(logits, min(top_k, logits.size(-1)))[0][..., -1, None]
        logits[logits < smallest] = -torch.inf
    if top_p < 1.0:
        ordered, order = torch.sort(logits, descending=True)
        gone = torch.cumsum(F.softmax(ordered, dim=-1), dim=-1) > top_p
        gone[..., 1:] = gone[..., :-1].clone()
        gone[..., 0] = 0
        logits[gone.scatter(1, order, gone)] = -torch.inf
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)


class PublishedLoop:
    """One generation of `positions` positions; `step(p)` runs position p, in any order that fills the buffers.

    labels: (B,) int64 on the generator's device.   scale: guidance at every position; 1 runs no second half.
    """

    def __init__(
        self,
        gpt: GPT,
        labels: Tensor,
        *,
        scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> None:
        if gpt.config.num_codebooks == 1:
            raise ValueError("the published loop with a depth head needs several codebooks")
        self.gpt, self.scale, self.filters = gpt, scale, (temperature, top_k, top_p)
        self.batch, self.guided = len(labels), scale != 1
        self.labels = torch.cat([labels, torch.full_like(labels, gpt.config.num_classes)]) if self.guided else labels
        self.trunk = Stack(list(gpt.layers), len(self.labels), gpt.config.num_positions + 1, gpt.norm.weight)
        self.codes = torch.zeros(
            self.batch, gpt.config.num_positions, gpt.config.num_codebooks, dtype=torch.int64, device=labels.device
        )

    def step(self, position: int, force: Tensor | None = None) -> Tensor:
        """Run one position and write its codes, or `force` (B, K) in their place; returns logits (B, K, V)."""
        gpt = self.gpt
        if position == 0:
            x = gpt.cls_embedding(self.labels).unsqueeze(1)
        else:
            before = self.codes[:, position - 1]
            before = torch.cat([before, before]) if self.guided else before
            x = torch.stack([table(before[:, k]) for k, table in enumerate(gpt.tok_embeddings.codebooks)]).sum(dim=0)
            x = x.unsqueeze(1)
        where = torch.tensor([position])
        hidden = norm(gpt.norm, self.trunk.step(x, where, gpt.rope.table[where.to(gpt.rope.table.device)]))
        return self.head(hidden, position, force)

    def head(self, x: Tensor, position: int, force: Tensor | None) -> Tensor:
        head, seen = self.gpt.output, []
        stack = Stack(list(head.layers), x.shape[0], self.gpt.config.num_codebooks, head.norm.weight)
        for k in range(self.gpt.config.num_codebooks):
            if k:
                code = self.codes[:, position, k - 1]
                x = head.codebooks[k - 1](torch.cat([code, code]) if self.guided else code).unsqueeze(1)
            logits = head.linear_head(norm(head.norm, stack.step(x, torch.tensor([k]), None)))[:, -1]
            if self.guided:
                conditional, unconditional = torch.split(logits, self.batch)
                logits = unconditional + (conditional - unconditional) * self.scale
            seen.append(logits)
            chosen = pick(logits.clone(), *self.filters) if force is None else force[:, k, None]
            self.codes[:, position, k] = chosen[:, 0]
        return torch.stack(seen, dim=1)
