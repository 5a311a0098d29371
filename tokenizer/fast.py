"""Decoding codes faster: the same decoder with its upsampling convolutions rewritten, channels last, in a chosen dtype.

A 3×3 convolution after nearest-neighbour doubling reads each source pixel up to four times. Seen from one of the four
places that an output pixel can have in its source pixel, the nine taps fall on only 2×2 source pixels, so four 2×2
convolutions of the small image, one a place, give the same output with 16 in place of 36 products a source pixel.
"""

from __future__ import annotations

import copy
import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.unitok import UniTok
from tokenizer.vitamin import Upsample2d

_log = logging.getLogger(__name__)

# Which of three taps fall on the first and on the second source pixel: for the even and for the odd output pixel.
_TAPS = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))


class PhaseUpsample2d(nn.Module):
    """`Upsample2d` as four convolutions: (B, C, H, W) → (B, out, 2H, 2W), equal up to rounding."""

    weights: Tensor
    bias: Tensor

    def __init__(self, plain: Upsample2d) -> None:
        super().__init__()
        weight = plain.conv.weight.detach()
        taps = torch.tensor(_TAPS, device=weight.device)  # (2 places, 2 source pixels, 3)
        phases = torch.einsum("ary,bsx,oiyx->aboirs", taps, taps, weight.float())
        self.register_buffer("weights", phases.to(weight.dtype))  # (2, 2, out, C, 2, 2)
        self.register_buffer("bias", plain.conv.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        out = x.new_empty(batch, len(self.bias), 2 * height, 2 * width).to(memory_format=torch.channels_last)
        for a in (0, 1):
            for b in (0, 1):
                padded = F.pad(x, (1 - b, b, 1 - a, a))
                out[:, :, a::2, b::2] = F.conv2d(padded, self.weights[a, b], self.bias)
        return out


class FastDecoder:
    """Codes → images like `UniTok.decode_unclamped`, from a copy of its decoder; what comes before it is in float32.

    dtype: of the decoder's weights and activations. float32 gives the plain decoder's images up to rounding (1e-5);
    bfloat16 is off by about a grey level on average.   compiled: by torch.compile, at the first call with a batch size
    (a minute); where that fails, one line says so and the decoder runs uncompiled.
    Raises ValueError for another tokenizer than UniTok.
    """

    def __init__(self, tokenizer: UniTok, dtype: torch.dtype = torch.float32, *, compiled: bool = False) -> None:
        if not isinstance(tokenizer, UniTok):
            raise ValueError(f"--decoder plain is the only one for a {type(tokenizer).__name__} tokenizer")
        self.tokenizer, self.dtype = tokenizer, dtype
        decoder = copy.deepcopy(tokenizer.decoder).eval().requires_grad_(False)
        for module in list(decoder.modules()):
            for name, child in module.named_children():
                if isinstance(child, Upsample2d):
                    setattr(module, name, PhaseUpsample2d(child))
        self.decoder = decoder.to(dtype).to(memory_format=torch.channels_last)
        self.compiled = torch.compile(self.decoder, dynamic=False) if compiled else None

    @torch.no_grad()
    def __call__(self, codes: Tensor) -> Tensor:
        """codes (B, L, K) in [0, V) → images (B, 3, H, W) float32, not clamped."""
        tokens = self.tokenizer.dequantize(codes).to(self.dtype)
        return self._decode(tokens).float()

    def _decode(self, tokens: Tensor) -> Tensor:
        if self.compiled is not None:
            try:
                return self.compiled(tokens)
            except torch.OutOfMemoryError:
                raise
            except (
                Exception
            ) as error:  # a missing C compiler, an unknown GPU: anything that a compiler can stumble over
                self.compiled = None
                _log.warning("torch.compile of the decoder failed (%s): it runs uncompiled", type(error).__name__)
        return self.decoder(tokens)
