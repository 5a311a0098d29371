"""The engine for CPUs: the same numbers as the plain one up to rounding, with what costs time there taken out.

A step at small batch is bounded by reading the weights once, so each matrix is stored, once per generator, in the
layout that its kernel reads fastest; w1 and w3 are one matrix. Attention reads up to the current position only, in
float32 products (the fused kernels for short bfloat16 queries are many times slower), and costs no mask.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen_unitok.gpt import GPT
from llamagen_unitok.layers import Block, RMSNorm
from llamagen_unitok.sampling.kept import Kept
from llamagen_unitok.sampling.steps import Run, SteppedEngine

# Weights of a layer x @ W.T + bias, packed once → x → x @ W.T + bias.
Linear = Callable[[Tensor], Tensor]
Pack = Callable[[Tensor, "Tensor | None", int], Linear]


def pack(weight: Tensor, bias: Tensor | None, rows: int) -> Linear:
    """A linear layer for inputs (rows, C), or fewer rows, in the layout that runs fastest.

    - one row in float32: the transposed matrix, which the vector kernel reads in order, where it is not narrow
    - else oneDNN's blocked layout, where torch has it for this CPU and number type
    - else the matrix as it is
    """
    wide = weight.shape[0] >= weight.shape[1]
    if rows == 1 and weight.dtype == torch.float32 and wide:
        columns = weight.t().contiguous()
        return (lambda x: x @ columns) if bias is None else (lambda x: torch.addmm(bias, x, columns))
    if not _has_blocked(weight.dtype):
        return lambda x: F.linear(x, weight, bias)
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    run = torch.ops.mkldnn._linear_pointwise
    return lambda x: run(x, blocked, bias, "none", [], "")


def _has_blocked(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed layers are there for this type, and fast: bfloat16 needs hardware that knows it."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedBlock:
    """One block's packed matrices, and its step."""

    def __init__(self, block: Block, rows: int, pack: Pack) -> None:
        attention, ffn = block.attention, block.feed_forward
        self.wqkv, self.wo = pack(attention.wqkv.weight, None, rows), pack(attention.wo.weight, None, rows)
        self.w13 = pack(torch.cat((ffn.w1.weight, ffn.w3.weight)), None, rows)
        self.w2 = pack(ffn.w2.weight, None, rows)
        self.attention_norm, self.ffn_norm = PackedNorm(block.attention_norm), PackedNorm(block.ffn_norm)
        self.q_norm, self.k_norm = (n and PackedNorm(n) for n in (attention.q_norm, attention.k_norm))
        self.heads, self.kv_heads = attention.heads, attention.kv_heads

    def step(self, x: Tensor, keys: Tensor, values: Tensor, p: int, turn: Tensor | None) -> Tensor:
        """x (rows, C) at position p, turn (D/2,) complex or None → (rows, C).

        keys, values: (rows, kv_heads, length, D) float32, filled before p; p is written.
        """
        x = x + self.wo(self._attend(self.wqkv(self.attention_norm(x)), keys, values, p, turn).to(x.dtype))
        gate, up = self.w13(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.w2(F.silu(gate) * up)

    def _attend(self, qkv: Tensor, keys: Tensor, values: Tensor, p: int, turn: Tensor | None) -> Tensor:
        rows, size = len(qkv), keys.shape[-1]
        qk, v = qkv.view(rows, -1, size).split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if self.q_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, : self.heads]), self.k_norm(qk[:, self.heads :])), dim=1)
        if turn is not None:
            qk = torch.view_as_real(torch.view_as_complex(qk.float().unflatten(-1, (-1, 2))) * turn).flatten(-2)
        keys[:rows, :, p] = qk[:, self.heads :]
        values[:rows, :, p] = v
        if p == 0:
            # The first position sees only itself.
            return v.float().repeat_interleave(self.heads // self.kv_heads, dim=1).flatten(1)
        q = qk[:, : self.heads].float().reshape(rows * self.kv_heads, -1, size)
        k, v = (cache[:rows].flatten(0, 1)[:, : p + 1] for cache in (keys, values))
        scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=size**-0.5)
        return torch.bmm(scores.softmax(-1), v).view(rows, -1)


class PackedNorm:
    """RMSNorm in fewer operations: normalised in float32, cast back, then multiplied by the gain."""

    def __init__(self, norm: RMSNorm) -> None:
        self.gain, self.width = norm.weight.detach(), norm.weight.shape[0]
        self.eps = torch.tensor(norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self.eps, length, length, value=1 / self.width).rsqrt_()
        return (x * scale).to(x.dtype) * self.gain


class PackedWeights:
    """All of a generator's matrices, packed. Embeddings stay where they are."""

    def __init__(self, gpt: GPT, rows: int, pack: Pack) -> None:
        with torch.no_grad():
            self.layers = [PackedBlock(block, rows, pack) for block in gpt.layers]
            self.norm = PackedNorm(gpt.norm)
            head = gpt.output
            self.head_layers = (
                [] if isinstance(head, nn.Linear) else [PackedBlock(block, rows, pack) for block in head.layers]
            )
            self.head_norm = None if isinstance(head, nn.Linear) else PackedNorm(head.norm)
            output = head if isinstance(head, nn.Linear) else head.linear_head
            self.output = pack(output.weight, output.bias, rows)
            self.turns = torch.view_as_complex(gpt.rope.table)  # (1 + L, D/2)


class PackedEngine(SteppedEngine):
    """Steps over packed weights and float32 caches."""

    pack = staticmethod(pack)

    def __init__(self, gpt: GPT, run: Run, kept: Kept) -> None:
        super().__init__(gpt, run, kept)
        # One row has layouts of its own; all other numbers of rows share theirs.
        kind = (self.pack, run.rows == 1)
        self.weights = kept.get("packed", kind, lambda: PackedWeights(gpt, run.rows, self.pack))
        self.caches, self.head_caches = kept.get("packed caches", run.rows, lambda: self._make_caches(run.rows))

    def _make_caches(self, rows: int) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """Keys and values of each layer, of the trunk and of the depth head."""
        config = self.gpt.config

        def caches(layers: int, length: int) -> list[tuple[Tensor, Tensor]]:
            shape = (rows, config.kv_heads, length, config.head_width)
            return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(layers)]

        return caches(config.layers, config.num_positions), caches(config.depth_layers, config.num_codebooks)

    def trunk(self, x: Tensor, p: int) -> Tensor:
        turn = self.weights.turns[p]
        for layer, (keys, values) in zip(self.weights.layers, self.caches, strict=True):
            x = layer.step(x, keys, values, p, turn)
        return self.weights.norm(x)

    def head(self, x: Tensor, k: int) -> Tensor:
        if self.weights.head_norm is not None:
            for layer, (keys, values) in zip(self.weights.head_layers, self.head_caches, strict=True):
                x = layer.step(x, keys, values, k, None)
            x = self.weights.head_norm(x)
        return self.weights.output(x)
