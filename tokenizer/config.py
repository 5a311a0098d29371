"""The shape of a tokenizer, and the sizes that have names."""

from __future__ import annotations

from dataclasses import dataclass, replace

PATCH = 16  # pixels along the side of one grid cell: stem, two stages and the last convolution halve the picture each


@dataclass(frozen=True)
class UniTokConfig:
    """Everything that decides the shapes and the arithmetic of a UniTok; stored as config.json beside the weights.

    The defaults are the released ViTamin-L tokenizer's. Widths are channels; `code_width` is that of one codebook.
    """

    img_size: int = 256
    # ViTamin encoder and its mirror
    stem_width: int = 160
    conv_widths: tuple[int, int] = (160, 320)
    conv_depths: tuple[int, int] = (2, 4)
    conv_expansion: float = 4.0
    width: int = 1024
    depth: int = 31
    heads: int = 16
    # quantization
    quantizer: str = "multi_codebook"
    num_codebooks: int = 8
    codebook_size: int = 4096
    code_width: int = 8
    projection: str = "attn"
    causal_projection: bool = False  # an early released checkpoint was trained with a causal mask there
    # CLIP heads; embed_dim 0 leaves out the image head
    embed_dim: int = 768
    text: bool = False
    text_width: int = 768
    text_heads: int = 12
    text_layers: int = 12
    text_vocab_size: int = 49408
    text_context_length: int = 77

    def __post_init__(self) -> None:
        if self.img_size <= 0 or self.img_size % PATCH:
            raise ValueError(f"img_size must be a positive multiple of {PATCH}, not {self.img_size}")
        for name in ("stem_width", "width", "depth", "heads", "num_codebooks", "code_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 2 <= self.codebook_size <= 65536:
            raise ValueError(f"codebook_size must be 2 to 65536 (codes are uint16 on disk), not {self.codebook_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.projection not in ("attn", "linear"):
            raise ValueError(f"projection must be attn or linear, not {self.projection!r}")
        if self.projection == "attn" and self.width % self.latent_width:
            raise ValueError(
                f"attention projection needs a width ({self.width}) that is a multiple of "
                f"num_codebooks × code_width ({self.latent_width}); use projection='linear' otherwise"
            )
        if self.text and not self.embed_dim:
            raise ValueError("a text tower needs embed_dim > 0")

    @property
    def grid(self) -> int:
        """Cells along the side of the code grid."""
        return self.img_size // PATCH

    @property
    def latent_width(self) -> int:
        """Channels that are quantized: all codebooks together."""
        return self.num_codebooks * self.code_width

    @property
    def num_positions(self) -> int:
        """L: cells of the grid."""
        return self.grid**2


_LARGE = UniTokConfig()

# vitamin_base and vitamin_large are the published ones; vitamin_tiny is the shipped demo's, for 128×128 pictures.
PRESETS: dict[str, UniTokConfig] = {
    "vitamin_large": _LARGE,
    "vitamin_base": replace(_LARGE, stem_width=128, conv_widths=(128, 256), width=768, depth=14, heads=12),
    "vitamin_tiny": replace(
        _LARGE,
        img_size=128,
        stem_width=16,
        conv_widths=(32, 64),
        conv_depths=(1, 2),
        conv_expansion=2.0,
        width=256,
        depth=4,
        heads=4,
        codebook_size=1024,
        embed_dim=0,
    ),
}
