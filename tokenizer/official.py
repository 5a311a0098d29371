"""Published tokenizer layouts → ours: pure functions on mappings of tensors.

Our module names are the published ones, so reading is choosing a config and leaving out what it does not build.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from modelfolder.names import plain_names
from tokenizer.config import PRESETS, UniTokConfig

TEXT_ENTRIES = ("text_encoder.", "logit_scale")


def read_official(
    args: Mapping[str, Any], state: Mapping[str, Tensor], *, text: bool
) -> tuple[UniTokConfig, dict[str, Tensor]]:
    """(config, tensors) of a UniTok checkpoint: ``ckpt["args"]`` and ``ckpt["trainer"]["unitok"]``.

    Sizes that a file may leave out have the published defaults. Raises ValueError for a layout that is not UniTok's.
    """
    config = config_from_args(args, text=text)
    tensors = {name: tensor for name, tensor in plain_names(state).items() if not name.endswith(".attn_mask")}
    if not text:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(TEXT_ENTRIES)}
    return config, tensors


def config_from_args(args: Mapping[str, Any], *, text: bool) -> UniTokConfig:
    """UniTokConfig for a published file's flat arguments; `vocab_size` and `vocab_width` there count all codebooks."""
    model = args.get("model", "vitamin_large")
    if model not in ("vitamin_base", "vitamin_large"):
        raise ValueError(f"published tokenizers are vitamin_base or vitamin_large, not {model!r}")
    if args.get("num_query", 0):
        raise ValueError(f"num_query = {args['num_query']}: only tokenizers without query tokens (0) can be read")
    num_codebooks = args.get("num_codebooks", 8)
    vocab_size, vocab_width = args.get("vocab_size", 32768), args.get("vocab_width", 64)
    if vocab_size % num_codebooks or vocab_width % num_codebooks:
        raise ValueError(
            f"vocab_size {vocab_size} and vocab_width {vocab_width} must divide into {num_codebooks} codebooks"
        )
    return replace(
        PRESETS[model],
        img_size=args.get("img_size", 256),
        num_codebooks=num_codebooks,
        codebook_size=vocab_size // num_codebooks,
        code_width=vocab_width // num_codebooks,
        projection=args.get("quant_proj", "attn"),
        causal_projection=bool(args.get("causal_projection", False)),
        embed_dim=args.get("embed_dim", 768),
        text=text,
        text_width=args.get("text_width", 768),
        text_heads=args.get("text_heads", 12),
        text_layers=args.get("text_layers", 12),
        text_vocab_size=args.get("text_vocab_size", 49408),
        text_context_length=args.get("text_context_length", 77),
    )
