"""Published generator checkpoints → our state dict and config: pure functions on a mapping of tensors.

Our keys are the published ones, so what is left to do is to unwrap, to strip what training wrappers add to names, and
to read the sizes. Reads LlamaGen (one codebook) and LlamaGen-UniTok (several codebooks with a depth head).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from llamagen_unitok.config import PRESETS, GPTConfig
from modelfolder.names import plain_names

# DDP / plain training; deepspeed; other trainers.
WRAPPER_KEYS = ("model", "module", "state_dict")

ROTATION_TABLE = "freqs_cis"
CLASS_TABLE = "cls_embedding.embedding_table.weight"


def published_state(state: Mapping[str, object]) -> dict[str, Tensor]:
    """Unwrap a checkpoint and give its tensors our names; drops the rotation table, which is computed.

    Raises ValueError when this is not a mapping of names to tensors.
    """
    state = unwrapped(state)
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"expected a state dict (names → tensors), got {type(state).__name__} without tensors")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise ValueError(f"expected a state dict (names → tensors); {name!r} is no name")
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"expected a state dict (names → tensors), bare or under {' / '.join(WRAPPER_KEYS)}; "
                f"entry {name!r} is a {type(tensor).__name__}"
            )
    return {name: tensor for name, tensor in plain_names(state).items() if name.split(".")[-1] != ROTATION_TABLE}


def unwrapped(state: object) -> object:
    """What is left when every wrapper of a checkpoint is taken off."""
    while isinstance(state, Mapping):
        inner = [state[key] for key in WRAPPER_KEYS if isinstance(state.get(key), Mapping)]
        if not inner:
            break
        state = inner[0]
    return state


def read_config(
    tensors: Mapping[str, Tensor], *, num_classes: int = 1000, num_positions: int = 256, n_head: int | None = None
) -> GPTConfig:
    """Read the architecture off the tensors of `published_state`.

    The number of heads leaves no trace in them: it comes from the preset of the same (layers, width), or from n_head.
    Raises ValueError naming what is missing or does not fit.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} holds {str(tensor.dtype).removeprefix('torch.')} numbers, which no weights are")
    rows, width = _matrix(tensors, CLASS_TABLE)
    if rows not in (num_classes, num_classes + 1):
        raise ValueError(
            f"{CLASS_TABLE} has {rows} rows: num_classes={num_classes} needs {num_classes}, "
            f"or {num_classes + 1} with a null class"
        )
    layers = _count(tensors, r"layers\.(\d+)\.")
    if not layers:
        raise ValueError("no layers.N.* among the tensors: this is no LlamaGen generator")
    single = "tok_embeddings.weight" in tensors
    codebook_size, _ = _matrix(tensors, "tok_embeddings.weight" if single else "tok_embeddings.codebooks.0.weight")
    if n_head is None:
        known = {(size.layers, size.width): size.heads for size in PRESETS.values()}
        if (layers, width) not in known:
            raise ValueError(f"no preset has {layers} layers of width {width}: give the number of heads as n_head")
        n_head = known[layers, width]
    if n_head < 1 or width % n_head:
        raise ValueError(f"n_head={n_head} does not divide the width {width}")
    qkv_rows, _ = _matrix(tensors, "layers.0.attention.wqkv.weight")
    kv_heads, rest = divmod(qkv_rows - width, 2 * (width // n_head))
    if rest or kv_heads < 1:
        raise ValueError(f"layers.0.attention.wqkv.weight has {qkv_rows} rows, which n_head={n_head} cannot give")
    return GPTConfig(
        layers=layers,
        heads=n_head,
        width=width,
        kv_heads=kv_heads,
        num_classes=num_classes,
        has_null_class=rows == num_classes + 1,
        num_positions=num_positions,
        num_codebooks=1 if single else _count(tensors, r"tok_embeddings\.codebooks\.(\d+)\."),
        codebook_size=codebook_size,
        depth_layers=_count(tensors, r"output\.layers\.(\d+)\."),
    )


def _matrix(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    if name not in tensors or tensors[name].ndim != 2:
        raise ValueError(f"no matrix {name} among the {len(tensors)} tensors: this is no class-conditional generator")
    rows, columns = tensors[name].shape
    return rows, columns


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers the names that start with `pattern` hold."""
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})
