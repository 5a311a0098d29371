"""The architecture of a generator, and the published sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple


class Size(NamedTuple):
    layers: int
    heads: int
    width: int


# Table 8 of LlamaGen (arXiv 2406.06525) and the larger sizes of its code.
PRESETS: dict[str, Size] = {
    "B": Size(12, 12, 768),
    "L": Size(24, 16, 1024),
    "XL": Size(36, 20, 1280),
    "XXL": Size(48, 24, 1536),
    "XXXL": Size(48, 40, 2560),
    "1B": Size(22, 32, 2048),
    "3B": Size(24, 32, 3200),
    "7B": Size(32, 32, 4096),
}


@dataclass(frozen=True)
class GPTConfig:
    """Everything that shapes a generator, plus the dropouts it is trained with.

    layers, heads, width: of the trunk; the depth head's blocks have the same heads and width.
    kv_heads: grouped-query heads; None = heads.
    has_null_class: whether the class table has a row `num_classes` that stands for "no class", which guidance needs.
        It is a shape; how often training uses the row is the training setting `class_dropout`.
    num_positions: image tokens in raster order; a perfect square.
    num_codebooks, depth_layers: (K, n) with n >= 1 for K > 1; (1, 0) is the original LlamaGen with a linear head.
    qk_norm: RMSNorm with a gain over each head's queries and keys, before their rotation (QK-norm, Henry et al.,
        arXiv 2010.04245; ViT-22B, arXiv 2302.05442, with its gains per channel). No published generator has it.
    residual_dropout, ffn_dropout: on the output of the attention and of the feed-forward branch.
    Raises ValueError, in one line, for values that make no model.
    """

    layers: int
    heads: int
    width: int
    kv_heads: int | None = None
    num_classes: int = 1000
    has_null_class: bool = True
    num_positions: int = 256
    num_codebooks: int = 8
    codebook_size: int = 4096
    depth_layers: int = 4
    ffn_multiple: int = 256
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    qk_norm: bool = False
    token_dropout: float = 0.1
    residual_dropout: float = 0.1
    ffn_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        counts = ("layers", "heads", "width", "kv_heads", "num_classes", "num_positions", "num_codebooks")
        for name in (*counts, "codebook_size", "ffn_multiple"):
            _check_int(name, getattr(self, name), least=1)
        _check_int("depth_layers", self.depth_layers, least=0)
        for name in ("has_null_class", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("token_dropout", "residual_dropout", "ffn_dropout"):
            if not 0 <= _number(name, getattr(self, name)) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("norm_eps", "rope_base"):
            if not 0 < _number(name, getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}")
        if self.width % (4 * self.heads):
            raise ValueError(
                f"width {self.width} does not divide into {self.heads} heads of a multiple of 4 channels, "
                "which 2-D rotary positions need"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}")
        if math.isqrt(self.num_positions) ** 2 != self.num_positions:
            raise ValueError(f"num_positions must be a square such as 256 = 16 × 16, got {self.num_positions}")
        if (self.num_codebooks == 1) != (self.depth_layers == 0):
            raise ValueError(
                f"num_codebooks {self.num_codebooks} with depth_layers {self.depth_layers}: "
                "several codebooks need a depth head (depth_layers >= 1), one codebook has none (depth_layers = 0)"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GPTConfig:
        """The config of a published size, with `changes` to other fields; ValueError lists the known names."""
        if name not in PRESETS:
            raise ValueError(f"unknown generator size {name!r}: choose one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name]._asdict(), **changes})

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def grid(self) -> int:
        """Tokens along one side of the image."""
        return math.isqrt(self.num_positions)

    @property
    def ffn_width(self) -> int:
        """Hidden width of the feed-forward part: 2/3 of 4 × width, rounded up to a multiple of `ffn_multiple`."""
        return math.ceil(8 * self.width // 3 / self.ffn_multiple) * self.ffn_multiple


def _check_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return value


_CODE_SHAPE = {"codebooks K": "num_codebooks", "codebook size V": "codebook_size", "positions L": "num_positions"}


def code_differences(found: Any, wanted: Any) -> list[str]:
    """Where the codes of two differ in shape, such as ``codebooks K = 4 instead of 8``; empty when they do not.

    found, wanted: configs of generators or tokenizers, or what describes code shards.
    """
    return [
        f"{what} = {getattr(found, name)} instead of {getattr(wanted, name)}"
        for what, name in _CODE_SHAPE.items()
        if getattr(found, name) != getattr(wanted, name)
    ]
