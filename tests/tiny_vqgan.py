"""A VQ tokenizer small enough for tests, random weights: K=1, V=11, a 4×4 grid of 64×64 pixels."""

import torch

from tokenizer import VQGAN, VQGANConfig

TINY_VQ = {
    "img_size": 64,
    "width": 32,
    "width_multiples": (1, 1, 1, 1, 1),
    "res_blocks": 1,
    "latent_width": 32,
    "codebook_size": 11,
    "code_width": 4,
}


def tiny_vqgan(seed: int = 0, **changes) -> VQGAN:
    """Eval mode; PyTorch's own initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VQGAN(VQGANConfig(**{**TINY_VQ, **changes})).eval()
