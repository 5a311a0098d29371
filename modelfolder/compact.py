"""8-bit storage: matrices as int8 rows with one float32 scale each, everything else in half precision.

For small models that ship with a repository. As stored, it is a way of lying on disk only: a model that is loaded
computes in floating point.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS, SCALES = ":int8", ":scale"  # endings of the two tensors that stand for one matrix
LARGEST = 127


def round_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A floating tensor (N, …) → int8 of its shape and scales (N,) float32, whose product is it but for half a step."""
    rows = matrix.float().flatten(1)
    # A row of zeros needs a scale too.
    scales = (rows.abs().amax(dim=1) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    steps = (rows / scales[:, None]).round().clamp(-LARGEST, LARGEST)
    return steps.to(torch.int8).view(matrix.shape), scales


def pack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floating tensors of two or more axes → NAME:int8 and NAME:scale (one per index of the first axis)."""
    packed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            packed[name] = tensor
        elif tensor.ndim < 2:
            packed[name] = tensor.half()
        else:
            packed[name + ROWS], packed[name + SCALES] = round_rows(tensor)
    return packed


def unpack(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Undo `pack`; floating tensors, packed or not, come out as `dtype`. A matrix is off by half a step at most."""
    unpacked: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(ROWS) and (scales := state.get(name.removesuffix(ROWS) + SCALES)) is not None:
            rows = tensor.float().flatten(1) * scales[:, None]
            unpacked[name.removesuffix(ROWS)] = rows.view(tensor.shape).to(dtype)
        elif not (name.endswith(SCALES) and name.removesuffix(SCALES) + ROWS in state):
            unpacked[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return unpacked
