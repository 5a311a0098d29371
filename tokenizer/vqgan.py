"""VQ-16 and VQ-8: LlamaGen's single-codebook convolutional tokenizers (arXiv 2406.06525, section 3.1; VQGAN).

Module names are those of the published checkpoint files: encoder, quant_conv, quantize, post_quant_conv, decoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelfolder import ModelFolder
from modelfolder.names import plain_names
from tokenizer.checks import check_codes, check_images

NORM_GROUPS, NORM_EPS = 32, 1e-6


@dataclass(frozen=True)
class VQGANConfig:
    """Everything that shapes the tokenizer; the defaults are VQ-16's. VQ-8 has width_multiples (1, 2, 2, 4).

    width × width_multiples: channels of the levels from fine to coarse; each level but the last halves the picture.
    latent_width: channels between encoder and quant_conv.   code_width: channels of the codebook.
    """

    img_size: int = 256
    width: int = 128
    width_multiples: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    latent_width: int = 256
    codebook_size: int = 16384
    code_width: int = 8

    def __post_init__(self) -> None:
        for name in ("img_size", "width", "res_blocks", "latent_width", "code_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.width_multiples or min(self.width_multiples) < 1:
            raise ValueError(f"width_multiples must be whole numbers of at least 1, not {self.width_multiples}")
        if self.width % NORM_GROUPS:
            raise ValueError(f"width must be a multiple of {NORM_GROUPS} (groups of the norms), not {self.width}")
        if self.img_size % self.patch:
            raise ValueError(f"img_size must be a multiple of {self.patch}, not {self.img_size}")
        if not 2 <= self.codebook_size <= 65536:
            raise ValueError(f"codebook_size must be 2 to 65536 (codes are uint16 on disk), not {self.codebook_size}")

    @property
    def patch(self) -> int:
        """Pixels along the side of one grid cell: 16 for VQ-16, 8 for VQ-8."""
        return 2 ** (len(self.width_multiples) - 1)

    @property
    def grid(self) -> int:
        """Cells along the side of the code grid."""
        return self.img_size // self.patch

    @property
    def num_positions(self) -> int:
        """L: cells of the grid."""
        return self.grid**2

    @property
    def num_codebooks(self) -> int:
        """K: always one."""
        return 1

    @property
    def level_widths(self) -> tuple[int, ...]:
        """Channels of each level, from fine to coarse."""
        return tuple(self.width * multiple for multiple in self.width_multiples)


class VQGAN(ModelFolder, nn.Module):
    """Images (B, 3, H, W) in [-1, 1] ↔ codes (B, L, 1) int64 in [0, V), raster order.

    The 1×1 convolutions beside the quantizer, and the quantizer, always compute in float32, also under autocast.
    """

    part = "tokenizer"
    kind = "vqgan"
    float32_only = True
    config_class = VQGANConfig

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_width, config.code_width, 1)
        self.quantize = Codebook(config.codebook_size, config.code_width)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.latent_width, 1)
        self.decoder = Decoder(config)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], H = W = img_size → codes (B, L, 1) int64."""
        return self.quantize.to_codes(self.latents(images).flatten(2).transpose(1, 2))[..., None]

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] → (B, code_width, √L, √L) float32: what the quantizer is given."""
        check_images(images, self.config)
        features = self.encoder(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.quant_conv(features.float())

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, L, 1) in [0, V) → images (B, 3, H, W) float32, clamped to [-1, 1]."""
        return self.decode_unclamped(codes).clamp(-1, 1)

    @torch.no_grad()
    def decode_unclamped(self, codes: Tensor) -> Tensor:
        """Like `decode`, without the clamp: what the published code gives. ValueError for another shape or range."""
        check_codes(codes, self.config)
        grid = self.config.grid
        with torch.autocast(codes.device.type, enabled=False):
            entries = self.quantize.lookup(codes[..., 0])  # (B, L, code_width)
            features = self.post_quant_conv(entries.transpose(1, 2).unflatten(2, (grid, grid)))
        return self.decoder(features).float()

    def reconstruct(self, images: Tensor) -> Tensor:
        """images → codes → images, clamped to [-1, 1]."""
        return self.decode(self.encode(images))

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], img_size: int = 256) -> VQGAN:
        """Build from a published state dict (``vq_ds16_c2i.pt``, ``vq_ds8_c2i.pt``: under ``model``).

        Sizes are read off the tensors. img_size: 256, 384 or any other multiple of the cell; the file leaves it open.
        Raises ValueError when the tensors are not exactly those of such a tokenizer.
        """
        counter = "quantize.codebook_used"  # of training
        tensors = {name: tensor for name, tensor in plain_names(state).items() if name != counter}
        config = config_from_tensors(tensors, img_size)
        with torch.device("meta"):
            model = cls(config)
        return model.load_exactly(tensors, "the published state dict")


def config_from_tensors(tensors: Mapping[str, Tensor], img_size: int) -> VQGANConfig:
    """The shape of a published VQ tokenizer; ValueError names the tensor that is missing."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise ValueError(f"{name} is not among the {len(tensors)} tensors: this is no VQ-16 or VQ-8 tokenizer")
        return tuple(tensors[name].shape)

    width = shape("encoder.conv_in.weight")[0]
    blocks = {
        match.groups() for name in tensors if (match := re.match(r"encoder\.conv_blocks\.(\d+)\.res\.(\d+)", name))
    }
    levels = 1 + max((int(level) for level, _ in blocks), default=-1)
    widths = [shape(f"encoder.conv_blocks.{level}.res.0.conv1.weight")[0] for level in range(levels)]
    codebook_size, code_width = shape("quantize.embedding.weight")
    return VQGANConfig(
        img_size=img_size,
        width=width,
        width_multiples=tuple(level_width // width for level_width in widths),
        res_blocks=1 + max((int(block) for _, block in blocks), default=-1),
        latent_width=shape("encoder.conv_out.weight")[0],
        codebook_size=codebook_size,
        code_width=code_width,
    )


class Codebook(nn.Module):
    """V entries, compared with and looked up as unit vectors, in float32."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(size, width)

    def unit_entries(self) -> Tensor:
        """(V, code_width), each row of unit length."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def to_codes(self, features: Tensor) -> Tensor:
        """(B, L, code_width) → (B, L) int64: the entry of largest cosine, the first in a tie."""
        with torch.autocast(features.device.type, enabled=False):
            return (F.normalize(features.float(), dim=-1) @ self.unit_entries().T).argmax(dim=-1)

    def lookup(self, codes: Tensor) -> Tensor:
        """(B, L) int64 in [0, V) → (B, L, code_width) float32 of unit length."""
        return F.embedding(codes, self.unit_entries())


class Encoder(nn.Module):
    """(B, 3, H, W) → (B, latent_width, √L, √L)."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = config.level_widths
        last = len(widths) - 1
        self.conv_in = _conv3(3, config.width)
        self.conv_blocks = nn.ModuleList(
            Level(before, width, config.res_blocks, attention=i == last, down=i < last)
            for i, (before, width) in enumerate(pairwise((config.width, *widths)))
        )
        self.mid = _middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv3(widths[-1], config.latent_width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.conv_blocks:
            x = level(x)
        for block in self.mid:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """(B, latent_width, √L, √L) → (B, 3, H, W), not clamped."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = config.level_widths[::-1]  # from coarse to fine
        last = len(widths) - 1
        self.conv_in = _conv3(config.latent_width, widths[0])
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            Level(before, width, config.res_blocks + 1, attention=i == 0, up=i < last)
            for i, (before, width) in enumerate(pairwise((widths[0], *widths)))
        )
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv3(widths[-1], 3)

    def forward(self, features: Tensor) -> Tensor:
        x = self.conv_in(features)
        for block in self.mid:
            x = block(x)
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Level(nn.Module):
    """Residual blocks at one size, each followed by attention at the coarsest size, then halving or doubling."""

    def __init__(
        self, in_width: int, width: int, blocks: int, *, attention: bool, down: bool = False, up: bool = False
    ):
        super().__init__()
        self.res = nn.ModuleList(ResidualBlock(in_width if i == 0 else width, width) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(width) for _ in range(blocks if attention else 0))
        if down:
            self.downsample = Downsample(width)
        if up:
            self.upsample = Upsample(width)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for resample in ("downsample", "upsample"):
            if hasattr(self, resample):
                x = getattr(self, resample)(x)
        return x


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm x))))), x through a 1×1 convolution where the width changes."""

    def __init__(self, in_width: int, width: int):
        super().__init__()
        self.norm1 = _norm(in_width)
        self.conv1 = _conv3(in_width, width)
        self.norm2 = _norm(width)
        self.conv2 = _conv3(width, width)
        self.nin_shortcut = nn.Conv2d(in_width, width, 1) if in_width != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttentionBlock(nn.Module):
    """Full self-attention over the cells, one head of all channels."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))  # (B, H·W, C)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Stride-2 3×3 convolution; one row of zeros below and one column at the right, none above and at the left."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3×3 convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = _conv3(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def _middle(width: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(width, width), AttentionBlock(width), ResidualBlock(width, width)])


def _conv3(in_width: int, out_width: int) -> nn.Conv2d:
    return nn.Conv2d(in_width, out_width, 3, padding=1)


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, width, eps=NORM_EPS)
