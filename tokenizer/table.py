"""The table of tokenizers: config.json names the one that a folder holds.

To add a tokenizer, write a class with the methods of `Tokenizer` and a `kind` of its own, and add it to the table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from modelfolder import ModelFolder, ModelFolderError, locate, stored_kind
from tokenizer.unitok import UniTok
from tokenizer.vqgan import VQGAN


class Tokenizer(Protocol):
    """Images (B, 3, H, W) in [-1, 1] ↔ codes (B, L, K) int64 in [0, V); a module and a ModelFolder.

    config: has img_size, grid, num_positions (L), num_codebooks (K) and codebook_size (V).
    """

    config: Any

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, codes: Tensor) -> Tensor:
        """Clamped to [-1, 1]."""

    def decode_unclamped(self, codes: Tensor) -> Tensor: ...

    def reconstruct(self, images: Tensor) -> Tensor: ...


PART = UniTok.part  # every tokenizer's folder in a bundle
TOKENIZERS: dict[str, type[ModelFolder]] = {tokenizer.kind: tokenizer for tokenizer in (UniTok, VQGAN)}


def tokenizer_folder(folder: Path) -> Path:
    """The tokenizer's own folder: that part of a bundle, or the folder itself."""
    return UniTok.part_of(folder)


def tokenizer_class(folder: Path) -> type[ModelFolder]:
    """The class of the tokenizer in a bundle or in a folder of its own; ModelFolderError lists the known kinds.

    Folders that name none are UniTok's: they were written before there was a choice.
    """
    path = tokenizer_folder(folder)
    kind = stored_kind(path) or UniTok.kind
    if kind not in TOKENIZERS:
        raise ModelFolderError(f"{path} holds a tokenizer of kind {kind!r}: known are {', '.join(TOKENIZERS)}")
    return TOKENIZERS[kind]


def read_tokenizer_config(folder: Path) -> Any:
    """The config of the tokenizer in a bundle or in a folder of its own."""
    return tokenizer_class(folder).read_config(tokenizer_folder(folder))


def load_tokenizer(path_or_hub_id: str | Path, *, device: str | torch.device = "cpu") -> Any:
    """Load whichever tokenizer a bundle, a folder of its own or a hub repository holds, in eval mode: a `Tokenizer`.

    Raises ModelFolderError as `ModelFolder.from_pretrained` does.
    """
    folder = locate(path_or_hub_id)
    return tokenizer_class(folder).from_pretrained(folder, device=device)
