"""What all processes must know of each other at every step, without holding a GPU up."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from llamagen_unitok.runtime.distributed import World


class _Posted(NamedTuple):
    step: int
    loss: Tensor
    norm: Tensor
    flags: Tensor  # on the host: stop wanted, loss or norm not finite; each on any process
    copied: torch.cuda.Event | None


class Agreement:
    """One exchange of flags a step: whether a stop is wanted anywhere, and whether a number is not finite anywhere.

    With `lag` (the default on CUDA) the host reads a step's answer after it has sent off the next one, so it never
    waits for the GPU's queue to run dry; `skip` then keeps the spoiled update from the weights until the host knows.
    Without, the answer is read at once.
    """

    def __init__(self, world: World, lag: bool | None = None):
        self.world = world
        self.lag = world.device.type == "cuda" if lag is None else lag
        self.stop = False
        self._posted: _Posted | None = None

    def exchange(self, step: int, loss: Tensor, norm: Tensor, stop: bool) -> Tensor:
        """Call on every process after the backward of `step`, before the optimizer's.

        Returns `skip`, a float tensor () on the device, 1 where the optimizer must not step: AdamW(fused=True) takes it
        as `found_inf`. Sets `stop`. Raises FloatingPointError as `settle` does: for this step or, with lag, for the one
        before.
        """
        finite = torch.isfinite(loss.detach()) & torch.isfinite(norm.detach())
        flags = torch.stack((torch.full_like(norm, float(stop)), (~finite).to(norm.dtype)))
        if self.world.size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        if self.lag:
            self.settle()
        copied = None
        host = flags.to("cpu", non_blocking=True)
        if flags.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._posted = _Posted(step, loss.detach(), norm.detach(), host, copied)
        if not self.lag:
            self.settle()
        return flags[1]

    def settle(self) -> None:
        """Read the answer that is still on its way, if any.

        Raises FloatingPointError, on all processes alike, when a number was not finite; names the step and the ranks.
        """
        if self._posted is None:
            return
        posted, self._posted = self._posted, None
        if posted.copied is not None:
            posted.copied.synchronize()
        stop, bad = posted.flags.tolist()
        self.stop = self.stop or bool(stop)
        if bad:
            raise FloatingPointError(self._reason(posted))

    def _reason(self, posted: _Posted) -> str:
        losses = [posted.loss.float()]
        if self.world.size > 1:
            losses = [torch.empty_like(losses[0]) for _ in range(self.world.size)]
            dist.all_gather(losses, posted.loss.float())
        values = [loss.item() for loss in losses]
        ranks = [str(rank) for rank, value in enumerate(values) if not math.isfinite(value)]
        if ranks:
            what = f"loss {values[int(ranks[0])]:g} is not finite at step {posted.step} on rank {', '.join(ranks)}"
        else:
            what = f"gradient norm {posted.norm.item():g} is not finite at step {posted.step} on rank 0 and all others"
            if self.world.size == 1:
                what = what.removesuffix(" and all others")
        return f"{what}: lower --lr, or resume with --precision fp32"
