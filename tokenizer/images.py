"""Pixels in and out: the one place that knows ranges, rounding and backgrounds.

Inside the models an image is float (B, 3, H, W) in [-1, 1]; outside it is uint8 (…, H, W, 3) or a PIL picture.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

RESIZE_METHODS = ("area", "bicubic")
# What Pillow raises for files that are cut short, damaged, of no known format, or larger than it takes.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Resize:
    """Another size for decoded pictures, such as 256 for the figures of 384-pixel generators.

    side: pixels.   method: "area", the mean over the pixels that a new one touches (PyTorch's), or "bicubic", without a
    low-pass filter, as LlamaGen's published sampling does; the two give different figures.
    Raises ValueError for other values.
    """

    side: int
    method: str = "area"

    def __post_init__(self) -> None:
        if isinstance(self.side, bool) or not isinstance(self.side, int) or self.side < 1:
            raise ValueError(f"--resize must begin with a whole number of pixels of at least 1, not {self.side!r}")
        if self.method not in RESIZE_METHODS:
            raise ValueError(f"--resize goes by {' or '.join(RESIZE_METHODS)}, as in 256:bicubic, not {self.method!r}")

    @classmethod
    def parse(cls, text: str) -> Resize:
        """The value of a flag: ``256`` or ``256:bicubic``."""
        side, _, method = text.partition(":")
        return cls(int(side) if side.isascii() and side.isdigit() else 0, method or cls.method)

    def __call__(self, images: Tensor) -> Tensor:
        """float (B, 3, H, W), better not yet clamped or rounded → (B, 3, side, side), not clamped."""
        return F.interpolate(images, size=(self.side, self.side), mode=self.method)


def to_unit(pixels: np.ndarray | Tensor) -> Tensor:
    """uint8 (H, W, 3) or (B, H, W, 3) in [0, 255] → float32 (3, H, W) or (B, 3, H, W), ``pixels / 255 · 2 − 1``."""
    pixels = torch.as_tensor(np.array(pixels) if not isinstance(pixels, Tensor) else pixels)
    if pixels.dtype != torch.uint8 or pixels.shape[-1] != 3:
        raise ValueError(f"expected uint8 pixels with 3 channels last, got {pixels.dtype} {tuple(pixels.shape)}")
    return (pixels.float() / 255 * 2 - 1).movedim(-1, -3).contiguous()


def to_uint8(images: Tensor) -> np.ndarray:
    """float (B, 3, H, W) in [-1, 1] → uint8 (B, H, W, 3), ``clamp(127.5 x + 128, 0, 255)`` truncated, as published.

    From CUDA by way of page-locked memory, on the current stream, which alone is waited for.
    """
    pixels = (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous()
    if pixels.is_cuda:
        locked = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True).copy_(pixels, non_blocking=True)
        torch.cuda.current_stream(pixels.device).synchronize()
        pixels = locked
    return pixels.cpu().numpy()


def load_rgb(
    file: str | Path | BinaryIO, background: tuple[int, int, int] = (255, 255, 255), *, name: str | None = None
) -> Image.Image:
    """Read a picture file as RGB; transparent parts are composed on `background` (white).

    file: a path, or an open binary file; what to call it in an error is then its `name`.
    Raises ValueError naming the file when it is no readable picture.
    """
    try:
        with Image.open(file) as picture:
            return on_background(picture, background)
    except _UNREADABLE as error:
        raise ValueError(f"{name or file} cannot be read as a picture ({error})") from error


def on_background(picture: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """RGB version of a PIL picture, its transparent parts composed on `background`."""
    if picture.mode == "RGB":
        return picture.copy()
    picture = picture.convert("RGBA")
    canvas = Image.new("RGBA", picture.size, (*background, 255))
    return Image.alpha_composite(canvas, picture).convert("RGB")


def adm_centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """The middle square of a picture at `size` × `size` pixels, as the ADM code (arXiv 2105.05233) makes it.

    Halved by box averaging while the shorter side is at least twice `size`, then bicubic until the shorter side is
    `size`, then cut. A picture of that size comes back unchanged.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    if scale != 1:
        shape = (round(picture.width * scale), round(picture.height * scale))
        picture = picture.resize(shape, Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def to_pil(images: Tensor) -> list[Image.Image]:
    """float (B, 3, H, W) in [-1, 1] → B PIL pictures."""
    return [Image.fromarray(pixels) for pixels in to_uint8(images)]


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture, (B,), for pictures in [-1, 1] (a peak-to-peak range of 2)."""
    error = (images.float() - originals.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp_min(1e-10))
