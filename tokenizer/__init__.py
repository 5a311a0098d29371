"""UniTok: images ↔ multi-codebook codes (arXiv 2502.20321). Pure models: no training, no processes."""

from tokenizer.config import PRESETS, UniTokConfig
from tokenizer.unitok import UniTok

__all__ = ["PRESETS", "UniTok", "UniTokConfig"]
