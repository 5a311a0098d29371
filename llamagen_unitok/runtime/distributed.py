"""Processes: the same code with one process or many.

Started by ``torchrun`` the group is made from its environment (nccl on CUDA, gloo on a CPU); started plainly, rank is
0, the world is 1 and every reduction is the identity.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from llamagen_unitok.runtime.errors import ToldByMain

# One process may have hours of work that the others wait for: checksums, previews, its last shard.
PATIENCE = timedelta(hours=12)
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class World:
    """Who this process is. `device` is where its model and batches live."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True for the one process that prints and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    def mean(self, value: Tensor) -> Tensor:
        """The mean of `value` over all processes, on each of them."""
        if self.size > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
            value /= self.size
        return value

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite `tensor` with the main process's, in place."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def gather(self, array: np.ndarray) -> list[np.ndarray]:
        """The arrays of all processes, in the order of their ranks, on the main one; an empty list on the others.

        Shapes may differ; the number of axes and the dtype may not.
        """
        if self.size == 1:
            return [array]
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
        shapes = [torch.zeros(tensor.ndim, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(shapes, torch.tensor(tensor.shape, dtype=torch.int64, device=self.device))
        if not self.is_main:
            if tensor.numel():
                dist.send(tensor, dst=0)
            return []
        gathered = [array]
        for rank in range(1, self.size):
            part = torch.empty(shapes[rank].tolist(), dtype=tensor.dtype, device=self.device)
            if part.numel():
                dist.recv(part, src=rank)
            gathered.append(part.cpu().numpy())
        return gathered

    def share_outcome(self, compute: Callable[[], Outcome]) -> Outcome:
        """What `compute` returns on the main process, on all of them; it runs there only. Its ValueError or
        OSError is shared too, as a ValueError.

        The result must be plain data: it travels as a pickle between the processes of one run.
        """
        if self.size == 1:
            return compute()
        outcome: list = [None, None]
        if self.is_main:
            try:
                outcome[0] = compute()
            except (ValueError, OSError) as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome, src=0, device=self.device)
        if outcome[1] is not None:
            raise (ValueError if self.is_main else ToldByMain)(outcome[1])
        return outcome[0]

    def together(self, compute: Callable[[], Outcome]) -> Outcome:
        """What `compute` returns here; it runs on every process. Where it raises ValueError or OSError on some, all
        raise that of the first of them, as a ValueError: none waits for one that has gone."""
        if self.size == 1:
            return compute()
        result, error = None, None
        try:
            result = compute()
        except (ValueError, OSError) as failed:
            error = str(failed)
        first = next((text for text in self.collect(error) if text is not None), None)
        if first is not None:
            raise (ValueError if self.is_main else ToldByMain)(first)
        return result

    def collect(self, value: Outcome) -> list[Outcome]:
        """The plain data of all processes, in the order of their ranks, on each of them."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """True on every process as soon as it is true on one."""
        if self.size == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def wrap(self, module: nn.Module) -> nn.Module:
        """`module` with averaged gradients. Its forward must give the loss: only forward averages."""
        if self.size == 1:
            return module
        return nn.parallel.DistributedDataParallel(
            module,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            # Constant tables, and counters that the trainer shares at each checkpoint.
            broadcast_buffers=False,
        )

    def share(self, global_batch: int) -> int:
        """This process's part of a global batch. ValueError if it does not divide."""
        if global_batch % self.size:
            raise ValueError(f"--batch-size {global_batch} does not divide into {self.size} processes")
        return global_batch // self.size


PRECISIONS = ("bf16", "tf32", "fp32")


def set_float32_products(precision: str) -> None:
    """How products of float32 tensors are computed on CUDA: in full under "fp32", else in TF32. The one place for it.

    Under "bf16" these are the few products that stay float32.
    """
    exact = precision == "fp32"
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32 = not exact


def pick_device(name: str = "auto") -> torch.device:
    """ "auto" is this process's CUDA device if there is one, else the CPU. ValueError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is not a device that this runs on: use auto, cpu or cuda")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda, but this machine has no CUDA device: use --device cpu")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= (count := torch.cuda.device_count()):
            raise ValueError(
                f"this process needs {device}, but this machine has {count} CUDA devices: start at most as many "
                "processes on it (torchrun --nproc-per-node)"
            )
        torch.cuda.set_device(device)
    return device


@contextmanager
def processes(device: str = "auto") -> Iterator[World]:
    """Join the process group that ``torchrun`` describes, if any, and leave it at the end."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = pick_device(device)
    if size == 1:
        yield World(rank=0, size=1, device=chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield World(rank=dist.get_rank(), size=size, device=chosen)
    finally:
        # A wrapped module that only a reference cycle keeps would carry the group's threads into the interpreter's end,
        # where a thread that asks for the lock aborts the process.
        gc.collect()
        dist.destroy_process_group()
