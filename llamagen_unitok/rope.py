"""Rotary positions on a square grid of image tokens (LlamaGen, arXiv 2406.06525, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rope_table(grid: int, head_width: int, base: float = 10000.0, device: torch.device | str | None = None) -> Tensor:
    """Cosine and sine for each sequence position and channel pair: (1 + grid², head_width / 2, 2), float32.

    The first half of the pairs turns by the grid row, the second half by the grid column.
    Row 0 belongs to the class token and is zero, the cosine too: that token's query and key vanish, so every later
    token scores 0 against it. Published models were trained so; an identity rotation there gives other results.
    """
    pairs = head_width // 4
    frequencies = base ** -(torch.arange(pairs, dtype=torch.float32, device=device) * 4 / head_width)
    angles = torch.arange(grid, dtype=torch.float32, device=device)[:, None] * frequencies  # (grid, D/4)
    by_row = angles[:, None].expand(grid, grid, pairs)
    by_column = angles[None].expand(grid, grid, pairs)
    turns = torch.cat((by_row, by_column), dim=-1).reshape(grid * grid, 2 * pairs)
    image = torch.stack((turns.cos(), turns.sin()), dim=-1)
    return torch.cat((torch.zeros_like(image[:1]), image))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn neighbouring channel pairs of x (B, T, H, D) by table (T, D/2, 2), in float32; returns x's dtype."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, H, D/2)
    cos, sin = table[:, None].unbind(-1)  # (T, 1, D/2)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


class RotaryTable(nn.Module):
    """Holds the table on the model's device; it is computed, never stored, and stays float32 in a bf16 model."""

    table: Tensor

    def __init__(self, grid: int, head_width: int, base: float) -> None:
        super().__init__()
        self.shape = (grid, head_width, base)
        self.register_buffer("table", rope_table(*self.shape), persistent=False)

    def materialize(self, device: torch.device) -> None:
        """Compute the table on `device`, after a build on the meta device."""
        self.table = rope_table(*self.shape, device=device)

    def _apply(self, fn, recurse: bool = True):
        # model.to(bfloat16) would round the angles, and to_empty() would leave them undefined: compute them again.
        super()._apply(fn, recurse)
        self.materialize(self.table.device)
        return self
