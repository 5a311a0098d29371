"""Multi-codebook quantization, MCQ (UniTok, arXiv 2502.20321, section 3.2).

The channels are cut into K chunks; chunk k is looked up in codebook k by cosine similarity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.config import UniTokConfig
from tokenizer.quantizers.base import Quantized

COMMITMENT = 0.25  # weight of the commitment term beside the codebook term
USAGE_DECAY = 0.99  # per training step, of the running share of draws that each entry gets


class Codebook(nn.Module):
    """V entries of one sub-codebook. `vocab_usage` (V,): running share of the codes that chose each entry."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.codebook = nn.Embedding(size, width)
        self.register_buffer("vocab_usage", torch.zeros(size))

    def unit_entries(self) -> Tensor:
        """(V, code_width), each row of unit length."""
        return F.normalize(self.codebook.weight.float(), dim=-1)


class MultiCodebookQuantizer(nn.Module):
    """K independent codebooks of V unit vectors; always computed in float32."""

    def __init__(self, config: UniTokConfig):
        super().__init__()
        self.codebook_size = config.codebook_size
        self.codebooks = nn.ModuleList(
            Codebook(config.codebook_size, config.code_width) for _ in range(config.num_codebooks)
        )

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Entries spread evenly over the unit sphere."""
        for book in self.codebooks:
            nn.init.normal_(book.codebook.weight, std=book.codebook.embedding_dim**-0.5, generator=generator)
            book.vocab_usage.zero_()

    def unit_entries(self) -> Tensor:
        """All codebooks, (K, V, code_width), rows of unit length."""
        return torch.stack([book.unit_entries() for book in self.codebooks])

    def unit_chunks(self, features: Tensor) -> Tensor:
        """(B, L, latent_width) → (K, B·L, code_width) of unit length; chunk k holds channels k·width to (k+1)·width."""
        chunks = features.float().unflatten(-1, (len(self.codebooks), -1))  # (B, L, K, code_width)
        return F.normalize(chunks, dim=-1).flatten(0, 1).transpose(0, 1)

    def to_codes(self, features: Tensor) -> Tensor:
        """(B, L, latent_width) → (B, L, K) int64: the entry of largest cosine in each codebook, the first in a tie."""
        with torch.autocast(features.device.type, enabled=False):
            indices = self._nearest(self.unit_chunks(features), self.unit_entries())  # (K, B·L)
        return indices.T.contiguous().unflatten(0, features.shape[:2])

    def lookup(self, codes: Tensor) -> Tensor:
        """(B, L, K) int64 in [0, V) → (B, L, latent_width) float32 of unit-length chunks."""
        entries = self.unit_entries()
        chosen = [F.embedding(codes[..., k], entries[k]) for k in range(len(self.codebooks))]
        return torch.cat(chosen, dim=-1)

    def forward(self, features: Tensor) -> Quantized:
        """Quantize with straight-through gradients; in train() mode the usage statistics are updated."""
        with torch.autocast(features.device.type, enabled=False):
            chunks = self.unit_chunks(features)  # (K, B·L, code_width)
            entries = self.unit_entries()  # (K, V, code_width)
            indices = self._nearest(chunks.detach(), entries.detach())  # (K, B·L)
            quantized = entries.gather(1, indices[..., None].expand(-1, -1, entries.shape[-1]))
            vq_loss = F.mse_loss(quantized, chunks.detach()) + COMMITMENT * F.mse_loss(chunks, quantized.detach())
            passed_on = chunks + (quantized - chunks).detach()
        if self.training:
            self._count(indices)
        shape = features.shape[:2]
        return Quantized(
            features=passed_on.transpose(0, 1).unflatten(0, shape).flatten(2),
            codes=indices.T.contiguous().unflatten(0, shape),
            vq_loss=vq_loss,
        )

    @staticmethod
    def _nearest(chunks: Tensor, entries: Tensor) -> Tensor:
        """(K, N, D) and (K, V, D) → (K, N) int64."""
        return torch.stack([(c @ e.T).argmax(dim=-1) for c, e in zip(chunks, entries, strict=True)])

    @torch.no_grad()
    def _count(self, indices: Tensor) -> None:
        for book, chosen in zip(self.codebooks, indices, strict=True):
            share = torch.bincount(chosen, minlength=self.codebook_size) / chosen.numel()
            book.vocab_usage.lerp_(share.to(book.vocab_usage), 1 - USAGE_DECAY)

    def usage(self, threshold: float = 0.05) -> Tensor:
        """(K,) share of entries in [0, 1] whose running share is above `threshold` of an even one (1/V)."""
        shares = torch.stack([book.vocab_usage for book in self.codebooks])
        return (shares * self.codebook_size > threshold).float().mean(dim=1)

    @torch.no_grad()
    def restart_unused(self, features: Tensor, generator: torch.Generator, threshold: float = 0.05) -> int:
        """Move entries that are (almost) never chosen onto features of this batch; returns how many were moved.

        features: (B, L, latent_width), what `forward` was given. Counters of moved entries start at an even share.
        """
        moved = 0
        for book, chunks in zip(self.codebooks, self.unit_chunks(features), strict=True):
            unused = (book.vocab_usage * self.codebook_size <= threshold).nonzero().flatten()
            rows = torch.randint(len(chunks), (len(unused),), generator=generator).to(chunks.device)
            lengths = book.codebook.weight.norm(dim=-1).mean()
            book.codebook.weight[unused] = (chunks[rows] * lengths).to(book.codebook.weight.dtype)
            book.vocab_usage[unused] = 1 / self.codebook_size
            moved += len(unused)
        return moved
