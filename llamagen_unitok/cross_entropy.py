"""Cross-entropy over codebooks, in float32 arithmetic, without float32 copies of the logits kept for the backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class LossTerms(NamedTuple):
    """nll: negative log-likelihood of each code, in nats.   log_z: logarithm of the softmax's normaliser.

    Both have one value for each code and are float32.
    """

    nll: Tensor
    log_z: Tensor


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits as they came (bf16 under autocast) and one number per row; one pass over V each way.

    PyTorch's own takes twice the time on a CPU: with 8 codes per position the logits are most of the step's memory.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        normalizer = logits.float().logsumexp(-1)
        ctx.save_for_backward(logits, normalizer, targets)
        return normalizer - logits.gather(-1, targets[:, None]).squeeze(-1).float(), normalizer

    @staticmethod
    def backward(ctx: Any, nll_gradient: Tensor, log_z_gradient: Tensor) -> tuple[Tensor, None]:
        logits, normalizer, targets = ctx.saved_tensors
        probs = (logits.float() - normalizer[:, None]).exp_().mul_((nll_gradient + log_z_gradient)[:, None])
        probs.scatter_add_(-1, targets[:, None], -nll_gradient[:, None])
        return probs.to(logits.dtype), None


def cross_entropy(logits: Tensor, codes: Tensor) -> Tensor:
    """logits (B, L, K, V), codes (B, L, K) → negative log-likelihoods (B, L, K) in nats, float32."""
    return loss_terms(logits, codes).nll


def loss_terms(logits: Tensor, codes: Tensor) -> LossTerms:
    """logits (B, L, K, V), codes (B, L, K) → likelihoods and normalisers, (B, L, K) each."""
    nll, log_z = _CrossEntropy.apply(logits.flatten(0, -2), codes.flatten())
    return LossTerms(nll.view_as(codes), log_z.view_as(codes))
