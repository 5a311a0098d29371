"""The packed engine with weights of one byte: a CPU's step at small batch is bounded by reading them.

A matrix is rounded to 8 bits when it is packed, each of its rows symmetrically with a scale of its own; so is each row
of the input at each step, and products are whole numbers until both scales are multiplied back. That moves logits by
about a hundredth of their spread, so codes are not those of the other engines, and it is never chosen by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llamagen_unitok.gpt import GPT
from llamagen_unitok.sampling.kept import Kept
from llamagen_unitok.sampling.packed import Linear, PackedEngine
from llamagen_unitok.sampling.steps import Run

LEVELS = 127  # on each side of zero
ZERO = 128  # of inputs, which oneDNN's kernel takes without a sign


def has_int8() -> bool:
    """Whether this torch has oneDNN's int8 products, and this CPU (VNNI) adds them up without overflow."""
    vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)()
    return vnni and torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")


def pack_int8(weight: Tensor, bias: Tensor | None, rows: int) -> Linear:
    """A linear layer for inputs (rows, C), or fewer rows: x → x @ W.T + bias in x's dtype, with both rounded to 8 bits.

    An output row depends on its input row alone, bit for bit.
    """
    weight = weight.float()
    scales = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny * LEVELS) / LEVELS
    rounded = (weight / scales[:, None]).round().to(torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(rounded, [rows, weight.shape[1]])
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    run = torch.ops.onednn.qlinear_pointwise

    def linear(x: Tensor) -> Tensor:
        wide = x.float()
        largest = torch.linalg.vector_norm(wide, torch.inf, dim=-1, keepdim=True).clamp_min_(1e-30)
        levels = (wide * (LEVELS / largest)).add_(ZERO + 0.5).to(torch.uint8)  # cut off, so this rounds
        y = run(levels, 1.0, ZERO, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")
        y.mul_(largest / LEVELS)
        return (y if bias is None else y.add_(bias)).to(x.dtype)

    return linear


class Int8Engine(PackedEngine):
    """Steps over weights of one byte. Raises ValueError where the CPU or this torch has no such products."""

    pack = staticmethod(pack_int8)

    def __init__(self, gpt: GPT, run: Run, kept: Kept) -> None:
        if not has_int8():
            raise ValueError("--engine int8 needs oneDNN's int8 kernels, which this torch or CPU lacks: use packed")
        super().__init__(gpt, run, kept)
