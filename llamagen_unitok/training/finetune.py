"""Starting a generator from the weights of another one, which may know other classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llamagen_unitok.config import GPTConfig, code_differences
from llamagen_unitok.gpt import GPT
from llamagen_unitok.labels import ClassNames
from modelfolder.folder import ModelFolderError, check_state, locate

CLASS_TABLE = "cls_embedding.embedding_table.weight"


def start_from(gpt: GPT, source: str | Path, names: Sequence[str] | None = None) -> int:
    """Copy the weights of a bundle, a generator folder or a hub id into `gpt`; returns how many classes came along.

    names: what the classes of `gpt` are called. Where the bundle names its classes too, a class takes the row of the
    class of the same name (upper and lower case do not count), and one that has none there keeps its fresh row. Where
    no name is shared, or one of the two has no names, the rows are copied if the number of classes is the same, else
    all stay fresh. The null class is copied where both have one.
    Raises ModelFolderError (a ValueError), in one line, when codes are of another kind (K, V, L) or anything but the
    class table has another shape.
    """
    folder = locate(source)
    other = GPT.from_pretrained(folder)
    _check_codes(gpt.config, other.config, source)
    theirs = ClassNames.load(folder)
    if theirs is not None and len(theirs) != other.config.num_classes:
        raise ModelFolderError(
            f"{source} names {len(theirs)} classes, but its generator has {other.config.num_classes}: mend labels.json"
        )
    state = other.state_dict()
    rows = _matching_rows(names, theirs, gpt.config.num_classes, other.config.num_classes)
    table = gpt.state_dict()[CLASS_TABLE].clone()
    if table.shape[1] == state[CLASS_TABLE].shape[1]:
        _copy_rows(table, state[CLASS_TABLE], rows)
        if gpt.config.has_null_class and other.config.has_null_class:
            table[-1] = state[CLASS_TABLE][-1]
        state[CLASS_TABLE] = table
    check_state(gpt, state, source)
    gpt.load_state_dict(state)
    return len(rows)


def _check_codes(ours: GPTConfig, theirs: GPTConfig, source: str | Path) -> None:
    differences = code_differences(theirs, ours)
    if differences:
        raise ModelFolderError(
            f"{source} was trained on other codes: {', '.join(differences)}; start from a generator for the same "
            "tokenizer, or extract the codes with the tokenizer it was trained with"
        )


def _matching_rows(names: Sequence[str] | None, theirs: ClassNames | None, ours: int, others: int) -> dict[int, int]:
    """Our class → their class, for those that are the same."""
    by_name: dict[str, int] = {}
    for label, name in enumerate(theirs.names if theirs else ()):
        by_name.setdefault(name.strip().casefold(), label)
    found = {label: by_name.get(name.strip().casefold()) for label, name in enumerate(names or ())}
    rows = {label: other for label, other in found.items() if other is not None}
    return rows or ({label: label for label in range(ours)} if ours == others else {})


@torch.no_grad()
def _copy_rows(table: Tensor, source: Tensor, rows: dict[int, int]) -> None:
    if rows:
        table[list(rows)] = source[list(rows.values())]
