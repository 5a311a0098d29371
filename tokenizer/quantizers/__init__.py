"""One quantizer, one file, and the table of them.

A quantizer is built from a UniTokConfig and offers

    forward(features (B, L, latent_width)) → Quantized
    to_codes(features) → (B, L, K) int64            lookup(codes) → (B, L, latent_width) float32
"""

from collections.abc import Callable

from torch import nn

from tokenizer.config import UniTokConfig
from tokenizer.quantizers.base import Quantized
from tokenizer.quantizers.multi_codebook import MultiCodebookQuantizer

QUANTIZERS: dict[str, Callable[[UniTokConfig], nn.Module]] = {
    "multi_codebook": MultiCodebookQuantizer,
}


def build_quantizer(config: UniTokConfig) -> nn.Module:
    """The quantizer that the config names; ValueError lists the known ones."""
    if config.quantizer not in QUANTIZERS:
        raise ValueError(f"unknown quantizer {config.quantizer!r}: known are {', '.join(sorted(QUANTIZERS))}")
    return QUANTIZERS[config.quantizer](config)


__all__ = ["QUANTIZERS", "MultiCodebookQuantizer", "Quantized", "build_quantizer"]
