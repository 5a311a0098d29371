"""LlamaGen-UniTok: class labels ↔ multi-codebook image codes (arXiv 2406.06525, 2502.20321)."""

from typing import Any

from llamagen_unitok.config import PRESETS, GPTConfig
from llamagen_unitok.gpt import GPT
from llamagen_unitok.sampling import SamplingConfig, generate

__all__ = ["GPT", "PRESETS", "GPTConfig", "ImageGenerator", "SamplingConfig", "generate"]


def __getattr__(name: str) -> Any:
    # The pipeline needs the tokenizer and its libraries; training and sampling of codes do not.
    if name == "ImageGenerator":
        from llamagen_unitok.pipeline import ImageGenerator

        return ImageGenerator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
