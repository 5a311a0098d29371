"""UniTok: one tokenizer for generation and understanding (arXiv 2502.20321).

Module names are those of the published checkpoint files: encoder, quant_proj, quantizer, post_quant_proj, decoder,
fc_norm, projection, text_encoder, logit_scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modelfolder import ModelFolder
from tokenizer.checks import check_codes, check_images
from tokenizer.config import UniTokConfig
from tokenizer.official import read_official
from tokenizer.projection import build_projections
from tokenizer.quantizers import build_quantizer
from tokenizer.vitamin import LayerNorm, ViTaminDecoder, ViTaminEncoder


class Reconstruction(NamedTuple):
    """One training pass. images: (B, 3, H, W) float32, not clamped; vq_loss: scalar; codes: (B, L, K).

    latents: (B, L, latent_width), before quantization.   embedding: (B, E) or None without an image head.
    """

    images: Tensor
    vq_loss: Tensor
    codes: Tensor
    latents: Tensor
    embedding: Tensor | None


class UniTok(ModelFolder, nn.Module):
    """Images (B, 3, H, W) in [-1, 1] ↔ codes (B, L, K) int64 in [0, V), raster order; and CLIP embeddings.

    The projections and the quantizer always compute in float32, also under autocast, as the published code does.
    """

    part = "tokenizer"
    kind = "unitok"
    float32_only = True
    config_class = UniTokConfig

    def __init__(self, config: UniTokConfig):
        super().__init__()
        self.config = config
        self.encoder = ViTaminEncoder(config)
        self.quant_proj, self.post_quant_proj = build_projections(config)
        self.quantizer = build_quantizer(config)
        self.decoder = ViTaminDecoder(config)
        if config.embed_dim:
            self.fc_norm = LayerNorm(config.width)
            self.projection = nn.Linear(config.width, config.embed_dim)
        if config.text:
            self.text_encoder = _build_text_tower(config)
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def init_weights(self) -> None:
        """Initialise everything for training from the global generator.

        linear weights   truncated normal, std 0.02, bias zero
        convolutions     normal, He by fan-out, bias zero
        codebooks        even over the sphere
        the rest         as built: norms 1 and 0, pos_embed 0, the text tower as open_clip initialises it
        """
        for module in (*self.encoder.modules(), *self.decoder.modules(), *self._projection_modules()):
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * math.prod(module.kernel_size) // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            else:
                continue
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        self.quantizer.init_weights()

    def freeze_encoder(self) -> None:
        """Take everything that decides the codes (encoder, projection, codebooks) out of training."""
        for module in (self.encoder, self.quant_proj, self.quantizer):
            module.requires_grad_(False)

    def freeze_embeddings(self) -> None:
        """Take what only makes embeddings (image head, text tower) out of training: for losses that read none."""
        for name, parameter in self.named_parameters():
            if name.split(".")[0] in ("fc_norm", "projection", "text_encoder", "logit_scale"):
                parameter.requires_grad_(False)

    def _projection_modules(self):
        yield from self.quant_proj.modules()
        yield from self.post_quant_proj.modules()
        if self.config.embed_dim:
            yield self.projection

    def forward(self, images: Tensor) -> Reconstruction:
        """Encode, quantize with straight-through gradients, decode: what training needs. images as for `encode`."""
        check_images(images, self.config)
        tokens = self.encoder(images)
        with torch.autocast(images.device.type, enabled=False):
            latents = self.quant_proj(tokens.float())
            quantized = self.quantizer(latents)
            tokens = self.post_quant_proj(quantized.features)
        return Reconstruction(
            images=self.decoder(tokens).float(),
            vq_loss=quantized.vq_loss,
            codes=quantized.codes,
            latents=latents,
            embedding=self._embed(tokens) if self.config.embed_dim else None,
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], H = W = img_size → codes (B, L, K) int64."""
        return self.quantizer.to_codes(self.latents(images))

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] → (B, L, latent_width) float32: what the quantizer is given."""
        check_images(images, self.config)
        tokens = self.encoder(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.quant_proj(tokens.float())

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, L, K) in [0, V) → images (B, 3, H, W), clamped to [-1, 1]."""
        return self.decode_unclamped(codes).clamp(-1, 1)

    @torch.no_grad()
    def decode_unclamped(self, codes: Tensor) -> Tensor:
        """Like `decode`, without the clamp."""
        return self.decoder(self.dequantize(codes)).float()

    @torch.no_grad()
    def dequantize(self, codes: Tensor) -> Tensor:
        """codes (B, L, K) in [0, V) → decoder tokens (B, L, C) float32. ValueError for another shape or range."""
        check_codes(codes, self.config)
        with torch.autocast(codes.device.type, enabled=False):
            return self.post_quant_proj(self.quantizer.lookup(codes))

    def reconstruct(self, images: Tensor) -> Tensor:
        """images → codes → images, clamped to [-1, 1]."""
        return self.decode(self.encode(images))

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] → (B, E) features of the *quantized* tokens, not normalised."""
        return self.embed_codes(self.encode(images))

    @torch.no_grad()
    def embed_codes(self, codes: Tensor) -> Tensor:
        """codes (B, L, K) → (B, E): mean over positions, norm, projection; not normalised."""
        if not self.config.embed_dim:
            raise ValueError("this tokenizer has no image head (embed_dim is 0)")
        return self._embed(self.dequantize(codes))

    @torch.no_grad()
    def encode_text(self, token_ids: Tensor) -> Tensor:
        """CLIP byte-pair ids (B, 77), padded with 0 → (B, E), not normalised. Needs the text tower."""
        if not self.config.text:
            raise ValueError("this tokenizer has no text tower: build it with text=True")
        return self.text_encoder(token_ids)

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.projection(self.fc_norm(tokens.mean(dim=1)))

    def materialize_buffers(self) -> None:
        if self.config.text:
            # The causal mask is not in the published files, so a build on the meta device leaves it without values.
            self.text_encoder.attn_mask = self.text_encoder.build_causal_mask()

    @classmethod
    def from_official(cls, args: Mapping[str, Any], state: Mapping[str, Tensor], text: bool = False) -> UniTok:
        """Build from a published file's ``args`` and ``trainer.unitok``; `text` keeps the text tower.

        Raises ValueError when the tensors are not exactly those that the arguments describe.
        """
        config, tensors = read_official(args, state, text=text)
        with torch.device("meta"):
            model = cls(config)
        return model.load_exactly(tensors, "the published state dict")


def _build_text_tower(config: UniTokConfig) -> nn.Module:
    try:
        from open_clip.transformer import TextTransformer
    except ImportError:
        raise ValueError("the text tower needs open_clip: pip install 'llamagen-unitok[train]'") from None
    return TextTransformer(
        context_length=config.text_context_length,
        vocab_size=config.text_vocab_size,
        width=config.text_width,
        heads=config.text_heads,
        layers=config.text_layers,
        output_dim=config.embed_dim,
    )
