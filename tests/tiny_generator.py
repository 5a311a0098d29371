"""A generator small enough for tests, with every parameter filled (a fresh one has a zero output layer)."""

import torch

from llamagen_unitok import GPT, GPTConfig

TINY = {
    "layers": 2,
    "heads": 4,
    "width": 32,
    "num_classes": 5,
    "num_positions": 9,
    "num_codebooks": 3,
    "codebook_size": 11,
    "depth_layers": 2,
    "ffn_multiple": 32,
}
SINGLE = {"num_codebooks": 1, "depth_layers": 0}
GROUPED = {"kv_heads": 2}


def tiny_gpt(seed: int = 0, **changes) -> GPT:
    """Eval mode; weights large enough that every input matters to every output."""
    gpt = GPT(GPTConfig(**{**TINY, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gpt.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1 + 0.1 * noise)
    return gpt.eval()


def random_batch(gpt: GPT, batch: int = 3, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (B,) and codes (B, L, K)."""
    config, generator = gpt.config, torch.Generator().manual_seed(seed)
    labels = torch.randint(config.num_classes, (batch,), generator=generator)
    shape = (batch, config.num_positions, config.num_codebooks)
    return labels, torch.randint(config.codebook_size, shape, generator=generator)
