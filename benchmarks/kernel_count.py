"""Kernels that a step would launch, counted where there is no GPU to count them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FREE = ("aten::empty", "aten::alias")  # memory, and nothing that runs


class Kernels(TorchDispatchMode):
    """Counts, by name, the operations that write somewhere: views, and casts to the type that is there, do not.

    Inside inference mode an operation counts once, whatever a CPU makes of it: norms, linear layers and attention are
    one kernel each, as on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation._schema.name
        read = {_storage(one) for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        made = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor) and one.numel()]
        writes = operation._schema.is_mutable or any(_storage(one) not in read for one in made)
        if made and writes and name not in FREE:
            self.names[name.removeprefix("aten::")] += 1
        return result


def _storage(tensor: torch.Tensor) -> int:
    # Weights in oneDNN's layouts have no storage, and no views.
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def count_kernels(work: Callable[[], object]) -> Counter[str]:
    """What `work` runs: name of an operation → how often."""
    with torch.inference_mode(), Kernels() as kernels:
        work()
    return kernels.names
