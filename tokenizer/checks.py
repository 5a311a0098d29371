"""What every tokenizer asks of its inputs; `config` is any tokenizer's."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def check_images(images: Tensor, config: Any) -> None:
    """ValueError unless images are (B, 3, img_size, img_size)."""
    side = config.img_size
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
        raise ValueError(f"images must be (B, 3, {side}, {side}), not {tuple(images.shape)}")


def check_codes(codes: Tensor, config: Any) -> None:
    """ValueError unless codes are (B, L, K) with entries in [0, V)."""
    expected = (config.num_positions, config.num_codebooks)
    if codes.ndim != 3 or tuple(codes.shape[1:]) != expected:
        raise ValueError(f"codes must be (B, {expected[0]}, {expected[1]}), not {tuple(codes.shape)}")
    if codes.numel() and not (0 <= int(codes.min()) and int(codes.max()) < config.codebook_size):
        raise ValueError(f"codes must lie in [0, {config.codebook_size}), found {codes.min()} to {codes.max()}")
