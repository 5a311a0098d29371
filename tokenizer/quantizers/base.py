"""What every quantizer returns."""

from typing import NamedTuple

from torch import Tensor


class Quantized(NamedTuple):
    """Result of quantizing features in training.

    features: (B, L, latent_width) float32, quantized, with the gradient of the input (straight-through).
    codes: (B, L, K) int64.   vq_loss: scalar, codebook and commitment terms.
    """

    features: Tensor
    codes: Tensor
    vq_loss: Tensor
