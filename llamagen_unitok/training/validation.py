"""The loss on pictures that are never trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from llamagen_unitok.runtime.distributed import World
from llamagen_unitok.training.data import CodeShards

BATCH = 16  # pictures that a process looks at together; no gradients, so it fits where training does
_MIDDLE = "centre"  # what the name of a middle crop starts with


def held_out_count(pictures: int, share: float) -> int:
    """How many of the pictures are held out: at least one where the share is above 0.

    ValueError if none is left to train on.
    """
    count = max(1, round(share * pictures)) if share else 0
    if count >= pictures:
        raise ValueError(f"--held-out {share} of {pictures} pictures leaves none to train on")
    return count


def split(pictures: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(trained, held out): indices in order, the second `held_out_count` of them, chosen by the seed alone."""
    count = held_out_count(pictures, share)
    order = np.random.default_rng([seed, 2]).permutation(pictures)
    return np.sort(order[count:]), np.sort(order[:count])


class Part(Dataset):
    """Some examples of a dataset of (index, draw), numbered anew from 0."""

    def __init__(self, dataset: Dataset, indices: np.ndarray):
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, ...]:
        index, draw = item
        return self.dataset[int(self.indices[index]), draw]


class Validation:
    """A watcher of the loop: every `every` steps the losses of the held-out pictures, with ``validation_`` before
    their names.

    Each picture counts once, in its middle view (or its first), with its class; nothing is dropped out. The processes
    share the pictures, and all of them run equally many batches, as sharded models need; padding has no weight.
    """

    def __init__(
        self,
        objective: nn.Module,
        shards: CodeShards,
        indices: Sequence[int] | np.ndarray,
        *,
        every: int,
        bf16: bool,
        world: World,
    ):
        self.objective, self.shards, self.every, self.bf16, self.world = objective, shards, every, bf16, world
        self.indices = np.asarray(indices)
        views = shards.meta.views
        self.view = next((i for i, name in enumerate(views) if name.startswith(_MIDDLE)), 0)

    def __call__(self, step: int, _weights: Callable[[], dict[str, Tensor]]) -> dict[str, float]:
        return self.losses() if step % self.every == 0 else {}

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """The means over all held-out pictures, the same on every process. Leaves the objective in train mode."""
        world = self.world
        sums: dict[str, Tensor] = {}
        self.objective.eval()
        for first in range(0, len(self.indices), BATCH * world.size):
            labels, codes, weights = self._batch(first + world.rank * BATCH)
            with torch.autocast(world.device.type, torch.bfloat16, enabled=self.bf16):
                _, logged = self.objective(labels, codes, weights=weights)
            for name, value in {**logged, "weight": torch.ones((), device=world.device)}.items():
                sums[name] = sums.get(name, 0) + value.float() * weights.sum()
        self.objective.train()
        means = world.mean(torch.stack(list(sums.values()))).tolist()
        totals = dict(zip(sums, means, strict=True))
        weight = totals.pop("weight")
        return {f"validation_{name}": total / weight for name, total in totals.items()}

    def _batch(self, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Labels (BATCH,), codes (BATCH, L, K) from held-out picture number `first` on, and weights 1, or 0 past the
        last one."""
        numbers = np.arange(first, first + BATCH)
        weights = torch.from_numpy((numbers < len(self.indices)).astype(np.float32))
        rows = [self.shards[int(self.indices[number % len(self.indices)]), self.view] for number in numbers]
        labels, codes = torch.tensor([label for label, _ in rows]), torch.from_numpy(np.stack([c for _, c in rows]))
        return tuple(tensor.to(self.world.device) for tensor in (labels, codes, weights))
