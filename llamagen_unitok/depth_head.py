"""Output heads: from the trunk's hidden state at one position to the logits of its K codes.

Both heads offer the same: `forward` (teacher forcing), `step` (one codebook, cached), `make_cache`, and `embed` where
there are several codebooks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llamagen_unitok.config import GPTConfig
from llamagen_unitok.layers import Block, KVCache, RMSNorm


class LinearHead(nn.Linear):
    """K = 1, the original LlamaGen (arXiv 2406.06525): one linear layer without bias."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config.width, config.codebook_size, bias=False)

    def forward(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """hidden (B, T, C) → logits (B, T, 1, V); the codes are not looked at."""
        return super().forward(hidden).unsqueeze(-2)

    def step(self, x: Tensor, k: int, cache: None) -> Tensor:
        """Hidden states x (B, C) → logits (B, V); k is 0."""
        return super().forward(x)

    def make_cache(self, batch: int) -> None:
        return None

    def zero_output(self) -> None:
        nn.init.zeros_(self.weight)


class DepthHead(nn.Module):
    """A small causal transformer over the K codebooks of one position (UniTok, arXiv 2502.20321, section 4.1).

    Step 0 sees the trunk's normed hidden state, step k the embedding of code k-1 from a table of its own. It knows
    neither the position nor the class but through that state. Names mirror the published `output.*` keys.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.codebooks = nn.ModuleList(
            nn.Embedding(config.codebook_size, config.width) for _ in range(config.num_codebooks - 1)
        )
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.linear_head = nn.Linear(config.width, config.codebook_size)

    def forward(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """hidden (B, T, C), codes (B, T, K) → logits (B, T, K, V); logits k see codes 0 … k-1 only."""
        previous = [table(codes[..., k]) for k, table in enumerate(self.codebooks)]
        x = torch.stack((hidden, *previous), dim=2).flatten(0, 1)  # (B·T, K, C)
        for layer in self.layers:
            x = layer(x)
        return self.linear_head(self.norm(x)).unflatten(0, hidden.shape[:2])

    def embed(self, codes: Tensor, k: int) -> Tensor:
        """Codes (B,) of codebook k - 1 → what step k sees, (B, C)."""
        return self.codebooks[k - 1](codes)

    def step(self, x: Tensor, k: int, cache: KVCache) -> Tensor:
        """Logits (B, V) of codebook k, cached.

        x (B, C): the trunk's hidden state for k = 0, which starts a position and forgets the one before; then the
        embedding of code k - 1. Steps come in order.
        """
        # Reusing the cache at the next position costs nothing; reallocating costs a kernel per layer.
        cache.filled = k
        x = x.unsqueeze(1)  # (B, 1, C)
        for index, layer in enumerate(self.layers):
            x = layer(x, cache=cache.layer(index))
        return self.linear_head(self.norm(x)).squeeze(1)

    def make_cache(self, batch: int) -> KVCache:
        return KVCache(len(self.layers), batch, self.config.num_codebooks, self.config, like=self.linear_head.weight)

    def zero_output(self) -> None:
        nn.init.zeros_(self.linear_head.weight)
        nn.init.zeros_(self.linear_head.bias)
