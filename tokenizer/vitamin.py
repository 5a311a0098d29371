"""ViTamin (arXiv 2404.02132) encoder, and the decoder that mirrors it (UniTok, section 3).

The building blocks are timm's; what timm lacks is the position vector and the way back up. Attribute names are those
of the published UniTok checkpoints, so their tensors load without renaming.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, LayerNormAct2d
from timm.models.vision_transformer import Block
from timm.models.vitamin import GeGluMlp, MbConvLNBlock, Stem, StridedConv
from torch import Tensor, nn

from tokenizer.config import UniTokConfig

EPS = 1e-6

LayerNorm = partial(nn.LayerNorm, eps=EPS)
GELUTanh = partial(nn.GELU, approximate="tanh")


def transformer_blocks(config: UniTokConfig) -> nn.Sequential:
    """`depth` pre-norm blocks with full attention and a gated feed-forward part (tanh GELU, hidden width 2 C)."""
    return nn.Sequential(
        *(
            Block(
                config.width,
                config.heads,
                mlp_ratio=2.0,
                qkv_bias=True,
                act_layer=GELUTanh,
                norm_layer=LayerNorm,
                mlp_layer=partial(GeGluMlp, act_layer="gelu_tanh"),
            )
            for _ in range(config.depth)
        )
    )


class ConvStages(nn.Module):
    """(B, 3, H, W) → (B, C, H/16, W/16): stem, two stages of inverted bottlenecks, and a last stride-2 convolution."""

    def __init__(self, config: UniTokConfig):
        super().__init__()
        self.stem = Stem(3, config.stem_width)
        widths = (config.stem_width, *config.conv_widths)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    *(
                        MbConvLNBlock(
                            before if i == 0 else width,
                            width,
                            stride=2 if i == 0 else 1,
                            expand_ratio=config.conv_expansion,
                        )
                        for i in range(depth)
                    )
                )
                for (before, width), depth in zip(pairwise(widths), config.conv_depths, strict=True)
            )
        )
        self.pool = StridedConv(stride=2, in_chans=config.conv_widths[-1], embed_dim=config.width)

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(self.stages(self.stem(images)))


class HybridPatches(nn.Module):
    """(B, 3, H, W) → (B, L, C): the conv part, its grid flattened in raster order."""

    def __init__(self, config: UniTokConfig):
        super().__init__()
        self.backbone = ConvStages(config)

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images).flatten(2).transpose(1, 2)


class ViTaminEncoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] → tokens (B, L, C)."""

    def __init__(self, config: UniTokConfig):
        super().__init__()
        self.patch_embed = HybridPatches(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1, config.width))  # one vector for every token
        self.blocks = transformer_blocks(config)
        self.norm = LayerNorm(config.width)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.blocks(self.patch_embed(images) + self.pos_embed))


class Upsample2d(nn.Module):
    """Nearest-neighbour doubling, then a full 3×3 convolution."""

    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        self.conv = nn.Conv2d(in_width, out_width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class UpBlock(nn.Module):
    """Inverted bottleneck that doubles the grid: the upsampling sits before the depthwise convolution."""

    def __init__(self, in_width: int, out_width: int, expansion: float):
        super().__init__()
        mid_width = int(out_width * expansion)
        self.shortcut = Upsample2d(in_width, out_width)
        self.pre_norm = LayerNorm2d(in_width, eps=EPS)
        self.conv1_1x1 = nn.Conv2d(in_width, mid_width, 1)
        self.up = Upsample2d(mid_width, mid_width)
        self.conv2_kxk = nn.Conv2d(mid_width, mid_width, 3, padding=1, groups=mid_width)
        self.conv3_1x1 = nn.Conv2d(mid_width, out_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.conv1_1x1(self.pre_norm(x)))  # (B, mid, H, W)
        h = F.gelu(self.conv2_kxk(self.up(h)))  # (B, mid, 2H, 2W)
        return self.conv3_1x1(h) + self.shortcut(x)


def up_stage(in_width: int, out_width: int, depth: int, expansion: float) -> nn.Sequential:
    """A doubling block, then depth − 1 blocks at the new size."""
    return nn.Sequential(
        UpBlock(in_width, out_width, expansion),
        *(MbConvLNBlock(out_width, out_width, expand_ratio=expansion) for _ in range(depth - 1)),
    )


class UpStem(nn.Module):
    """The stem turned round: doubling, norm with GELU, 3×3 convolution to RGB."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.conv1 = Upsample2d(width, out_width)
        self.norm1 = LayerNormAct2d(out_width, eps=EPS, act_layer="gelu")
        self.conv2 = nn.Conv2d(out_width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.norm1(self.conv1(x)))


class ViTaminDecoder(nn.Module):
    """Tokens (B, L, C) → images (B, 3, 16·√L, 16·√L), not clamped."""

    def __init__(self, config: UniTokConfig):
        super().__init__()
        (fine, coarse), (fine_depth, coarse_depth) = config.conv_widths, config.conv_depths
        self.grid = config.grid
        self.blocks = transformer_blocks(config)
        self.norm = LayerNorm(config.width)
        self.up_conv1 = Upsample2d(config.width, coarse)
        self.up_conv2 = up_stage(coarse, coarse, coarse_depth, config.conv_expansion)
        self.up_conv3 = up_stage(coarse, fine, fine_depth, config.conv_expansion)
        self.up_conv4 = UpStem(fine, config.stem_width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.blocks(tokens))  # (B, L, C)
        x = x.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # (B, C, √L, √L)
        x = x.contiguous(memory_format=torch.channels_last)
        return self.up_conv4(self.up_conv3(self.up_conv2(self.up_conv1(x))))
