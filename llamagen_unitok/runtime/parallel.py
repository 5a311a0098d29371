"""One objective on many processes: replicated (DDP) or sharded (FSDP2), compiled and recomputed block by block.

The objective's parameters keep their names, whatever is chosen here, so a checkpoint fits every choice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llamagen_unitok.runtime.distributed import World

PARALLEL = ("auto", "ddp", "fsdp", "hsdp")
RECOMPUTE = ("none", "selective", "full")
COMPILE = ("auto", "on", "off")
# Per parameter, in float32: the weight, its gradient and AdamW's two moments.
_STATE_BYTES = 16
# A training state that takes more than this share of a GPU is sharded under --parallel auto.
_REPLICATED_SHARE = 1 / 3


def wrap_blocks(blocks: list[nn.Module], recompute: str, compiled: bool) -> None:
    """Change how `blocks` run, in place; neither their results nor the names of their parameters change.

    recompute: "full" keeps a block's input only and runs its forward again for the backward; "selective" also keeps
    what matrix products and attention gave, and computes the cheap rest again; "none" keeps everything.
    compiled: torch.compile each block's forward: blocks of one shape share one compilation.
    """
    for block in blocks:
        if recompute != "none":
            contexts = {"context_fn": _keep_products} if recompute == "selective" else {}
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **contexts)
        if compiled:
            # Trunk and depth head call their blocks with two shapes. Left to itself, dynamo would take the second for a
            # dynamic one, which attention's is_causal does not allow, and run it uncompiled.
            block.forward = torch.compile(block.forward, dynamic=False)


# What selective recomputation keeps.
PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _keep_products() -> tuple:
    def policy(_context: object, operator: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class ParallelModule:
    """An objective as a step runs it: calling it gives what its forward gives, and its gradients are averaged.

    Under FSDP2 the parameters of `module` become sharded DTensors on the world's device, so optimizer and average must
    be built after this. bf16 is autocast when replicated; when sharded, parameters are gathered in bf16, gradients are
    reduced in float32 and the shards stay float32.
    """

    def __init__(
        self,
        module: nn.Module,
        world: World,
        *,
        parallel: str = "auto",
        shard_size: int = 0,
        bf16: bool = False,
        blocks: list[nn.Module],
    ):
        """blocks: the parts that are gathered one after the other under FSDP2; with none, fsdp is refused.

        shard_size: under hsdp, over how many processes one copy of the model is spread; 0 = those of this node.
        Raises ValueError when that does not divide the processes, or when there are no blocks to shard.
        """
        self.module, self.world = module, world
        self.kind = pick_parallel(parallel, module, world, can_shard=bool(blocks))
        self.sharded = self.kind in ("fsdp", "hsdp")
        if self.sharded:
            _shard(module, world, blocks, _shard_size(self.kind, shard_size, world), bf16)
            self._call: nn.Module = module
        else:
            self._call = world.wrap(module.to(world.device))
        self._autocast = bf16 and not self.sharded

    def __call__(self, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self._autocast):
            return self._call(*batch)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Forward and backward of one part of a step's batch; gradients are exchanged with the `last` one only."""
        if self.sharded:
            self.module.set_requires_gradient_sync(last)
            yield
        elif last or self.world.size == 1:
            yield
        else:
            with self._call.no_sync():
                yield


def pick_parallel(name: str, module: nn.Module, world: World, can_shard: bool) -> str:
    """What ``--parallel`` means here: "none" for one process, else ddp, fsdp or hsdp; ValueError if it cannot be."""
    if world.size == 1:
        return "none"
    if name == "auto":
        if world.device.type != "cuda" or not can_shard:
            return "ddp"
        memory = torch.cuda.get_device_properties(world.device).total_memory
        return pick_by_memory(sum(p.numel() for p in module.parameters()), memory)
    if name in ("fsdp", "hsdp") and not can_shard:
        raise ValueError(f"--parallel {name}: this model has no blocks to shard; use --parallel ddp")
    return name


def pick_by_memory(parameters: int, memory: float) -> str:
    """What ``--parallel auto`` means on several GPUs of so many bytes each: fsdp or ddp."""
    return "fsdp" if _STATE_BYTES * parameters > _REPLICATED_SHARE * memory else "ddp"


def _shard_size(kind: str, shard_size: int, world: World) -> int:
    if kind == "fsdp":
        return world.size
    size = shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    if world.size % size:
        raise ValueError(f"--shard-size {size} does not divide the {world.size} processes of this run")
    return size


def _shard(module: nn.Module, world: World, blocks: list[nn.Module], shard_size: int, bf16: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if shard_size == world.size:
        mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    else:
        shape = (world.size // shard_size, shard_size)
        mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
    # Inputs are not cast: the rotary table must stay float32, and embeddings of bf16 tables are bf16 already.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    module.to(world.device)  # buffers


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, without a copy; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_state(state: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """A sharded state dict as whole tensors on the main process (on the CPU), empty on the others; all must call it."""
    whole = {}
    for name, tensor in state.items():
        full = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        if world.is_main:
            whole[name] = full
    return whole
