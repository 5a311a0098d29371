"""Pixels in and out: the one place that knows ranges, rounding and backgrounds.

Inside the models an image is float (B, 3, H, W) in [-1, 1]; outside it is uint8 (…, H, W, 3) or a PIL picture.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_unit(pixels: np.ndarray | Tensor) -> Tensor:
    """uint8 (H, W, 3) or (B, H, W, 3) in [0, 255] → float32 (3, H, W) or (B, 3, H, W), ``pixels / 255 · 2 − 1``."""
    pixels = torch.as_tensor(np.array(pixels) if not isinstance(pixels, Tensor) else pixels)
    if pixels.dtype != torch.uint8 or pixels.shape[-1] != 3:
        raise ValueError(f"expected uint8 pixels with 3 channels last, got {pixels.dtype} {tuple(pixels.shape)}")
    return (pixels.float() / 255 * 2 - 1).movedim(-1, -3).contiguous()


def to_uint8(images: Tensor) -> np.ndarray:
    """float (B, 3, H, W) in [-1, 1] → uint8 (B, H, W, 3), ``clamp(127.5 x + 128, 0, 255)`` truncated, as published."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous().cpu().numpy()


def load_rgb(path: str | Path, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Read a picture file as RGB; transparent parts are composed on `background` (white).

    Raises ValueError naming the file when it is no readable picture.
    """
    try:
        with Image.open(path) as picture:
            return on_background(picture, background)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error})") from error


def on_background(picture: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """RGB version of a PIL picture, its transparent parts composed on `background`."""
    if picture.mode == "RGB":
        return picture.copy()
    picture = picture.convert("RGBA")
    canvas = Image.new("RGBA", picture.size, (*background, 255))
    return Image.alpha_composite(canvas, picture).convert("RGB")


def to_pil(images: Tensor) -> list[Image.Image]:
    """float (B, 3, H, W) in [-1, 1] → B PIL pictures."""
    return [Image.fromarray(pixels) for pixels in to_uint8(images)]


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture, (B,), for pictures in [-1, 1] (a peak-to-peak range of 2)."""
    error = (images.float() - originals.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp_min(1e-10))
