"""A generator's weights as steps of fixed shape read them, and what is between one attention and the next.

The functions take nothing but tensors and numbers, so one compilation serves every layer of a size, and each runs as
few kernels as plain PyTorch can: w1 and w3 are one matrix, queries, keys and values turn together, residuals are added
by the matrix product. Attention itself and its cache stay outside, so that neither the position nor the length that is
read ever asks for another compilation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen_unitok.gpt import GPT
from llamagen_unitok.layers import Block


class BlockWeights(NamedTuple):
    """One block's weights; w13 is w1 above w3. Norms of queries and keys are None where there are none.

    None is a Parameter, since a compiler tells those from tensors and would compile for each mix of both.
    """

    attention_norm: Tensor
    wqkv: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    wo: Tensor
    ffn_norm: Tensor
    w13: Tensor
    w2: Tensor
    heads: int
    kv_heads: int
    head_width: int
    eps: float

    @classmethod
    def of(cls, block: Block) -> BlockWeights:
        attention, ffn = block.attention, block.feed_forward
        q_norm, k_norm = (norm and norm.weight.detach() for norm in (attention.q_norm, attention.k_norm))
        return cls(
            attention_norm=block.attention_norm.weight.detach(),
            wqkv=attention.wqkv.weight.detach(),
            q_norm=q_norm,
            k_norm=k_norm,
            wo=attention.wo.weight.detach(),
            ffn_norm=block.ffn_norm.weight.detach(),
            w13=torch.cat((ffn.w1.weight, ffn.w3.weight)).detach(),
            w2=ffn.w2.weight.detach(),
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            head_width=attention.wqkv.weight.shape[0] // (attention.heads + 2 * attention.kv_heads),
            eps=block.attention_norm.eps,
        )

    def without_queries(self) -> BlockWeights:
        """The same block where a sequence begins: who sees only himself needs no query."""
        return self._replace(wqkv=self.wqkv[self.heads * self.head_width :], heads=0)


class LastWeights(NamedTuple):
    """What follows a stack of blocks: a norm and a linear layer, either of them None where there is none."""

    norm: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class FixedWeights:
    """All that steps of fixed shape read of a generator. Merged matrices are a second copy, the others are shared."""

    def __init__(self, gpt: GPT) -> None:
        config, head = gpt.config, gpt.output
        several = not isinstance(head, nn.Linear)
        with torch.no_grad():
            self.layers = [BlockWeights.of(block) for block in gpt.layers]
            self.head_layers = [BlockWeights.of(block) for block in (head.layers if several else ())]
            self.first_head_layers = [block.without_queries() for block in self.head_layers]
            tables = gpt.tok_embeddings.codebooks if several else [gpt.tok_embeddings]
            self.codes = torch.cat([table.weight for table in tables]) if several else tables[0].weight  # (K·V, C)
            self.head_codes = [table.weight for table in (head.codebooks if several else ())]
            self.first_rows = torch.arange(len(tables), device=self.codes.device) * config.codebook_size
            self.table = gpt.rope.table
            self.turns = whole_turns(gpt.rope.table, config.heads + config.kv_heads, config.kv_heads)
            self.last = LastWeights(gpt.norm.weight, None, None, gpt.norm.eps)
            output = head.linear_head if several else head
            self.head_last = LastWeights(
                head.norm.weight if several else None, output.weight, output.bias, config.norm_eps
            )
            self.steps = torch.arange(config.num_codebooks, device=self.codes.device)
            positions = torch.arange(config.num_positions, device=self.codes.device)
            ahead = positions > positions[:, None]
            self.masks = torch.zeros_like(ahead, dtype=self.codes.dtype).masked_fill_(ahead, -torch.inf)  # (L, L)

    def embed(self, codes: Tensor) -> Tensor:
        """The codes of a position (rows, K) → the sum of their embeddings (rows, C), added up in float32."""
        return F.embedding_bag(codes + self.first_rows, self.codes, mode="sum")


def merged_bytes(gpt: GPT) -> int:
    """What `FixedWeights` takes beside the generator's own weights."""
    config, itemsize = gpt.config, gpt.norm.weight.element_size()
    ffn = 2 * config.ffn_width * config.width * (config.layers + config.depth_layers)
    tables = config.num_codebooks * config.codebook_size * config.width if config.num_codebooks > 1 else 0
    return (ffn + tables) * itemsize


def whole_turns(table: Tensor, turning: int, resting: int) -> Tensor:
    """Rotations (T, D/2, 2) of one head → of all of a position, (T, heads, D/2, 2), the last `resting` at rest."""
    rest = torch.zeros_like(table)
    rest[..., 0] = 1
    return torch.stack((table,) * turning + (rest,) * resting, dim=1)


def enter(x: Tensor, block: BlockWeights, turn: Tensor | None) -> Tensor:
    """The input x (rows, C) of a stack's first block → its queries, keys and values (rows, H + 2 kv, D).

    turn: (1, H + 2 kv, D/2, 2) float32, what `whole_turns` gives for the position; None without positions.
    """
    normed = F.rms_norm(x, x.shape[-1:], block.attention_norm, block.eps)
    qkv = F.linear(normed, block.wqkv).unflatten(-1, (-1, block.head_width))
    if block.q_norm is not None:
        q, k, v = qkv.split((block.heads, block.kv_heads, block.kv_heads), dim=1)
        q, k = (
            F.rms_norm(one, one.shape[-1:], gain, block.eps) for one, gain in ((q, block.q_norm), (k, block.k_norm))
        )
        qkv = torch.cat((q, k, v), dim=1)
    return qkv if turn is None else _turned(qkv, turn)


def pass_on(
    x: Tensor, y: Tensor, block: BlockWeights, following: BlockWeights, turn: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A block's input x (rows, C), which may be overwritten, and its attention's answer y (rows, H·D) → the input of
    the block that follows, and what that `enter`s with."""
    x = _after_attention(x, y, block)
    return x, enter(x, following, turn)


def leave(x: Tensor, y: Tensor, block: BlockWeights, last: LastWeights) -> Tensor:
    """The same after a stack's last block → what `finish` makes of its output."""
    return finish(_after_attention(x, y, block), last)


def finish(x: Tensor, last: LastWeights) -> Tensor:
    """x (rows, C) → normed, and mapped to logits (rows, V) where `last` has a linear layer."""
    if last.norm is not None:
        x = F.rms_norm(x, x.shape[-1:], last.norm, last.eps)
    return x if last.weight is None else F.linear(x, last.weight, last.bias)


def _after_attention(x: Tensor, y: Tensor, block: BlockWeights) -> Tensor:
    x = _plus_product(x, y, block.wo)
    gate, up = F.linear(F.rms_norm(x, x.shape[-1:], block.ffn_norm, block.eps), block.w13).chunk(2, dim=-1)
    return _plus_product(x, F.silu(gate) * up, block.w2)


def _turned(qkv: Tensor, turn: Tensor) -> Tensor:
    pairs = qkv.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # Inductor fuses all of this, and has no complex numbers
        (even, odd), (cos, sin) = pairs.unbind(-1), turn.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn))
    return turned.flatten(-2).to(qkv.dtype)


def _plus_product(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """x + y @ weight.T; compiled, the sum goes into the next norm's kernel, else into the product's, in place."""
    return x + F.linear(y, weight) if torch.compiler.is_compiling() else x.addmm_(y, weight.t())
