"""Output heads: from the trunk's hidden state at one position to the logits of its K codes.

Both heads offer the same three things: `forward` (teacher forcing), `step` (one codebook, cached) and `make_cache`.
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

    def step(self, hidden: Tensor, previous: Tensor | None, cache: None) -> Tensor:
        """hidden (B, C) → logits (B, V)."""
        return super().forward(hidden)

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

    def step(self, hidden: Tensor, previous: Tensor | None, cache: KVCache) -> Tensor:
        """Logits (B, V) of the next codebook, cached.

        hidden (B, C) starts a position: `previous` is None, and the cache is taken as empty. Then `previous` (B,) is
        the code just chosen.
        """
        if previous is None:
            # Reusing the cache at the next position costs nothing; reallocating costs a kernel per layer.
            cache.filled = 0
            x = hidden.unsqueeze(1)  # (B, 1, C)
        else:
            x = self.codebooks[cache.filled - 1](previous).unsqueeze(1)
        for index, layer in enumerate(self.layers):
            x = layer(x, cache=cache.layer(index))
        cache.filled += 1
        return self.linear_head(self.norm(x)).squeeze(1)

    def make_cache(self, batch: int) -> KVCache:
        return KVCache(len(self.layers), batch, self.config.num_codebooks, self.config, like=self.linear_head.weight)

    def zero_output(self) -> None:
        nn.init.zeros_(self.linear_head.weight)
        nn.init.zeros_(self.linear_head.bias)
