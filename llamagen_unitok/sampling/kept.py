"""What a run leaves for the next one of the same generator: caches, packed weights, captured graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from weakref import WeakKeyDictionary

from llamagen_unitok.gpt import GPT

Part = TypeVar("Part")

# Generator → (what its weights were, parts by kind). Values must not hold the generator, or it would never be freed.
_KEPT: WeakKeyDictionary[GPT, tuple[Hashable, dict]] = WeakKeyDictionary()


class Kept:
    """Parts of the last run, one of each kind, each with the key (such as a shape) that it was built for."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[Hashable, object]] = {}

    def get(self, kind: str, key: Hashable, build: Callable[[], Part]) -> Part:
        """The part of this kind if it has this key; else it is dropped, and a new one is built and kept."""
        if kind not in self._parts or self._parts[kind][0] != key:
            self._parts.pop(kind, None)
            self._parts[kind] = (key, build())
        return self._parts[kind][1]


@contextmanager
def kept_for(gpt: GPT) -> Iterator[Kept]:
    """The kept parts of `gpt`, for one run at a time: a second run beside it builds its own.

    They are dropped when a weight or a buffer changed since (was replaced, moved, cast, or written in place under
    autograd's eyes; writing through `.data` is not seen), and when the run fails, so that memory is free again.
    """
    marks = _marks(gpt)
    before, parts = _KEPT.pop(gpt, (None, None))
    if parts is None or marks is None or before != marks:
        parts = Kept()
    yield parts
    if marks is not None:
        _KEPT[gpt] = (marks, parts)


def release(gpt: GPT) -> None:
    """Free what was kept for `gpt`: useful where generating is a small part of what the memory is for."""
    _KEPT.pop(gpt, None)


def _marks(gpt: GPT) -> Hashable:
    """Something that changes with the weights; None where changes cannot be noticed."""
    tensors = [*gpt.parameters(), *gpt.buffers()]
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return tuple((tensor.data_ptr(), tensor._version, tensor.dtype, tensor.device) for tensor in tensors)
