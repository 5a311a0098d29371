"""How alike two pictures are: structural similarity and LPIPS. (PSNR is in tokenizer.images.)"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW = 11  # pixels along the side of the Gaussian window
SIGMA = 1.5  # pixels
PEAK = 255.0
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2

# LPIPS network → the torchvision weights of its trunk, which are not inside the package lpips
LPIPS_TRUNKS = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity of each picture, (B,) float64 in [-1, 1]; 1 for equal pictures.

    images, originals: (B, 3, H, W), any number type, values in [0, 255]; H and W at least 11.
    Wang et al. 2004: Gaussian window of 11×11 with sigma 1.5, only where it fits wholly inside the picture,
    K1 = 0.01, K2 = 0.03, variances with weights that add up to 1. Each RGB channel alone, then the mean over
    channels and places.   Raises ValueError for other shapes.
    """
    if images.shape != originals.shape or images.ndim != 4 or min(images.shape[2:]) < WINDOW:
        raise ValueError(
            f"SSIM compares two (B, 3, H, W) with sides of at least {WINDOW}, "
            f"not {tuple(images.shape)} and {tuple(originals.shape)}"
        )
    # float64: a variance is the small difference of two numbers of up to 255²
    x, y = images.double(), originals.double()
    mean_x, mean_y = _windowed(x), _windowed(y)
    var_x = _windowed(x * x) - mean_x**2
    var_y = _windowed(y * y) - mean_y**2
    cov = _windowed(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    contrast_structure = (2 * cov + C2) / (var_x + var_y + C2)
    return (luminance * contrast_structure).mean(dim=(1, 2, 3))


def _windowed(x: Tensor) -> Tensor:
    """Gaussian-weighted means (B, C, H - 10, W - 10)."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    weights = weights / weights.sum()
    flat = x.flatten(0, 1).unsqueeze(1)  # every channel a picture of its own
    flat = F.conv2d(F.conv2d(flat, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))
    return flat.view(*x.shape[:2], *flat.shape[2:])


def load_lpips(network: str, device: torch.device) -> tuple[Callable[[Tensor, Tensor], Tensor] | None, str]:
    """LPIPS 0.1 (Zhang et al. 2018) as (distance, ""), or (None, the reason) where it cannot be had. Fetches nothing.

    distance: two (B, 3, H, W) float32 in [-1, 1] → (B,) float32, 0 for equal pictures.   network: alex, vgg or squeeze;
    its trunk is torchvision's, looked for among the files that torch.hub has fetched before.
    """
    try:
        import lpips
        from torchvision import models
    except ImportError:
        return None, "the package lpips is not installed: pip install -e '.[eval]'"
    url = getattr(models, LPIPS_TRUNKS[network]).IMAGENET1K_V1.url
    trunk = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not trunk.is_file():
        return None, f"the weights of its network are not on disk: fetch {url} to {trunk.parent}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips calls torchvision in a way that is no longer liked
            model: nn.Module = lpips.LPIPS(net=network, version="0.1", verbose=False).eval().to(device)
    except Exception as error:  # whatever is wrong with a file, the other figures are still wanted
        return None, f"the weights of its network cannot be read: {trunk.name}: {' '.join(str(error).split())[:200]}"
    model.requires_grad_(False)
    return lambda images, originals: model(images, originals).flatten(), ""
