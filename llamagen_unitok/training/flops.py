"""What a training step costs, counted without running one: floating-point operations, parameters, memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from llamagen_unitok.config import GPTConfig
from llamagen_unitok.gpt import GPT
from llamagen_unitok.runtime.parallel import PRODUCTS

# Dense bf16 TFLOP/s by the makers' data sheets; the first name that the device's holds counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
}


class Flops(NamedTuple):
    """Forward and backward of one picture, in FLOPs: matrices of trunk and head, attention of both."""

    trunk: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.trunk + self.attention + self.head

    @property
    def head_share(self) -> float:
        return self.head / self.total


def flops_per_image(config: GPTConfig, head_share: float = 1.0) -> Flops:
    """2 FLOPs per weight and token forward and 4 backward, and causal attention's two products; no recomputation.

    The trunk runs L positions (the class and all codes but the last), the head K steps at each; embeddings are only
    looked up.
    head_share: of the positions that the head is trained at.
    """
    width, length = config.width, config.num_positions
    block = 2 * width**2 + 2 * width * config.kv_heads * config.head_width + 3 * width * config.ffn_width
    head_positions = length if head_share == 1 else max(1, round(head_share * length))
    steps = head_positions * config.num_codebooks
    head = config.depth_layers * block + width * config.codebook_size

    def attention(tokens: int) -> int:  # scores and weighted values over the lower triangle, 2 FLOPs each, thrice
        return 3 * 2 * 2 * width * tokens * (tokens + 1) // 2

    return Flops(
        trunk=6 * config.layers * block * length,
        attention=config.layers * attention(length)
        + config.depth_layers * head_positions * attention(config.num_codebooks),
        head=6 * head * steps,
    )


class Parameters(NamedTuple):
    trunk: int
    head: int
    embeddings: int

    @property
    def total(self) -> int:
        return sum(self)


def parameters(config: GPTConfig) -> Parameters:
    """Counted off the model: blocks and last norm; all of the head, its tables included; code and class tables."""
    with torch.device("meta"):
        gpt = GPT(config)
    trunk, head, total = (
        sum(p.numel() for part in parts for p in part.parameters())
        for parts in ((gpt.layers, gpt.norm), (gpt.output,), (gpt,))
    )
    return Parameters(trunk, head, total - trunk - head)


class Activations(NamedTuple):
    """Bytes kept from the forward to the backward pass: of each picture, and whatever the batch (cast weights)."""

    per_image: float
    fixed: float


@functools.cache
def activations(config: GPTConfig, head_share: float = 1.0, bf16: bool = True, recompute: str = "none") -> Activations:
    """Counted by running the forward on tensors without data: every storage that autograd keeps, once.

    recompute: as in runtime.parallel.wrap_blocks; what the largest block keeps while it is computed again comes on top.
    Operation by operation, without torch.compile; buffers that live only inside an operation are not counted.
    """

    def kept(batch: int) -> int:  # blocks of the trunk are alike: two of them tell about any number
        one, two = (
            _kept_bytes(replace(config, layers=layers), batch, head_share, bf16, recompute) for layers in (1, 2)
        )
        return one + (config.layers - 1) * (two - one)

    one, two = kept(1), kept(2)
    return Activations(two - one, 2 * one - two)


class _Kept:
    """Storages of tensors, each once."""

    def __init__(self) -> None:
        self.tensors: dict[int, Tensor] = {}

    def note(self, tensor: Tensor) -> Tensor:
        self.tensors[tensor.untyped_storage()._cdata] = tensor  # holding it keeps the address from being used again
        return tensor

    def bytes_beside(self, *others: Iterable[int]) -> int:
        """Bytes of all storages but those of `others`, which are addresses."""
        known = set().union(*others)
        return sum(t.untyped_storage().nbytes() for address, t in self.tensors.items() if address not in known)


class _NoteProducts(TorchDispatchMode):
    def __init__(self, kept: _Kept):
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in PRODUCTS:
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, Tensor):
                    self.kept.note(tensor)
        return result


def _kept_bytes(config: GPTConfig, batch: int, head_share: float, bf16: bool, recompute: str) -> int:
    kept, within = _Kept(), []

    def recomputed(forward: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
        kept.note(x)
        inside = _Kept()
        within.append(inside)
        with (
            saved_tensors_hooks(inside.note, inside.note),
            _NoteProducts(kept) if recompute == "selective" else nullcontext(),
        ):
            return forward(x, *rest)

    with FakeTensorMode():
        gpt = GPT(config).train()
        for block in (*gpt.layers, *getattr(gpt.output, "layers", ())) if recompute != "none" else ():
            block.forward = functools.partial(recomputed, block.forward)
        labels = torch.zeros(batch, dtype=torch.int64)
        codes = torch.zeros(batch, config.num_positions, config.num_codebooks, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), saved_tensors_hooks(kept.note, kept.note):
            gpt(labels, codes, return_loss=True, head_share=head_share)
        own = {tensor.untyped_storage()._cdata for tensor in (*gpt.parameters(), *gpt.buffers(), labels, codes)}
        largest = max((inside.bytes_beside(own, kept.tensors) for inside in within), default=0)
        return kept.bytes_beside(own) + largest


class Memory(NamedTuple):
    """Bytes on one device."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    activations: float

    @property
    def total(self) -> float:
        return sum(self)


def memory(
    config: GPTConfig,
    *,
    batch: int,
    shards: int = 1,
    ema: bool = False,
    head_share: float = 1.0,
    bf16: bool = True,
    recompute: str = "none",
    accumulate: int = 1,
) -> Memory:
    """With fp32 weights and AdamW. batch: pictures on this device at once.   shards: devices that share one copy of
    everything but activations; 1 = each has its own (DDP).   recompute: as in runtime.parallel.wrap_blocks.
    accumulate: parts of a step's batch; with several, FSDP2 sums whole gradients before it shares them out."""
    whole = 4 * parameters(config).total
    copy = whole / shards
    kept = activations(config, head_share, bf16, recompute)
    gradients = copy + (whole if shards > 1 and accumulate > 1 else 0)
    return Memory(copy, gradients, 2 * copy, copy if ema else 0.0, kept.fixed + batch * kept.per_image)


def peak_flops(device: torch.device, tflops: float | None = None) -> float | None:
    """FLOP/s that MFU is a share of: `tflops` × 10¹² if given, else the device's by name, None where none is known."""
    if tflops is not None:
        return tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for known, peak in PEAK_TFLOPS.items() if known in name), None)


class Duration(NamedTuple):
    """images_per_sec: over all devices; the loader must deliver as many."""

    images_per_sec: float
    hours: float
    device_hours: float


def duration(flops: Flops, images: float, *, devices: int, peak: float, mfu: float) -> Duration:
    """Of a run over `images` pictures at the share `mfu` of `peak` FLOP/s of each device."""
    rate = devices * peak * mfu / flops.total
    hours = images / rate / 3600
    return Duration(rate, hours, devices * hours)


def spelled_hours(hours: float) -> str:
    """ "3 d 4 h", "5.2 h" or "12 min"."""
    if hours >= 48:
        days, rest = divmod(math.floor(hours + 0.5), 24)
        return f"{days} d {rest} h"
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
