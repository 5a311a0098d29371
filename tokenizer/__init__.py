"""Tokenizers: images ↔ codes. Pure models: no training, no processes.

UniTok has several codebooks (arXiv 2502.20321); VQGAN, LlamaGen's VQ-16 and VQ-8, has one (arXiv 2406.06525).
"""

from tokenizer.config import PRESETS, UniTokConfig
from tokenizer.table import TOKENIZERS, Tokenizer, load_tokenizer, read_tokenizer_config, tokenizer_folder
from tokenizer.unitok import UniTok
from tokenizer.vqgan import VQGAN, VQGANConfig

__all__ = [
    "PRESETS",
    "TOKENIZERS",
    "VQGAN",
    "Tokenizer",
    "UniTok",
    "UniTokConfig",
    "VQGANConfig",
    "load_tokenizer",
    "read_tokenizer_config",
    "tokenizer_folder",
]
