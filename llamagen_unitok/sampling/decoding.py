"""Decoding: position by position and, within a position, codebook by codebook."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llamagen_unitok.gpt import GPT
from llamagen_unitok.sampling.draws import Draw
from llamagen_unitok.sampling.engines import engine_class
from llamagen_unitok.sampling.kept import kept_for
from llamagen_unitok.sampling.seeds import MAX_SEED, picture_uniforms, running_indices
from llamagen_unitok.sampling.settings import SamplingConfig
from llamagen_unitok.sampling.steps import Chooser, Run


def generate(
    gpt: GPT,
    labels: Tensor | Sequence[int],
    *,
    cfg_scale: float = 1.0,
    cfg_schedule: str = "constant",
    cfg_power: float = 1.0,
    cfg_interval: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    indices: Tensor | Sequence[int] | None = None,
    engine: str = "auto",
    progress: bool = False,
) -> Tensor:
    """Sample one picture's codes per label, as one batch: (B, L, K) int64 on the generator's device.

    labels: (B,) in [0, num_classes).   indices: (B,), which picture of the seed each row is; None counts the pictures
    within each class, from 0.   The other settings: SamplingConfig.
    For one batch shape, device, dtype and engine, a row depends only on its label, the seed and its index. The batch is
    run as given: a caller that splits a large run pads the last batch.
    Raises ValueError for wrong settings or labels, for guidance without a null class, and for non-finite logits.
    Sampling: LlamaGen (arXiv 2406.06525), section 3.3; codebook by codebook: UniTok (arXiv 2502.20321), section 4.1.
    """
    config = SamplingConfig(
        cfg_scale=cfg_scale,
        cfg_schedule=cfg_schedule,
        cfg_power=cfg_power,
        cfg_interval=cfg_interval,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    config.check_generator(gpt.config)
    label_list = _whole_numbers("labels", labels, gpt.config.num_classes)
    index_list = running_indices(label_list) if indices is None else _whole_numbers("indices", indices, MAX_SEED)
    if len(index_list) != len(label_list):
        raise ValueError(f"{len(label_list)} labels but {len(index_list)} indices: give one index per label")

    device = gpt.norm.weight.device
    uniforms = picture_uniforms(seed, index_list, gpt.config.num_positions, gpt.config.num_codebooks).to(device)
    return decode(
        gpt,
        torch.tensor(label_list, dtype=torch.int64, device=device),
        Draw(uniforms, temperature, top_k, top_p),
        config.scales(gpt.config.num_positions),
        engine=engine,
        progress=progress,
    )


def decode(
    gpt: GPT,
    labels: Tensor,
    chooser: Chooser,
    scales: Sequence[float],
    *,
    engine: str = "auto",
    progress: bool = False,
) -> Tensor:
    """The decoding loop: codes (B, len(scales), K), each the chooser's answer to its guided logits.

    labels: (B,) int64 on the generator's device.   scales: the guidance scale at each position; positions from the
    first to the last whose scale is not 1 run the null class beside the labels, later ones do not.
    Nothing in the loop waits for a CUDA device. Dropout is off during the call, whatever the generator's mode, which
    is left as it was.
    """
    run = Run(labels, tuple(scales), chooser)
    engine_of = engine_class(engine, labels.device.type)
    was_training = gpt.training
    gpt.eval()
    try:
        with torch.inference_mode(), _on(labels.device), kept_for(gpt) as kept:
            steps = engine_of(gpt, run, kept)
            for p in tqdm(range(len(scales)), desc="generating", unit="position", disable=not progress, leave=False):
                steps.position(p)  # the trunk's step, then for each codebook the depth head's step and the draw
                if p == 0 and labels.device.type == "cpu":
                    _check_finite(steps.finite)  # at once where looking costs nothing
            _check_finite(steps.finite)
            codes = steps.codes[:, : len(scales)]
    finally:
        gpt.train(was_training)
    # Outside inference mode, so that the caller can train on them.
    return codes.clone()


def _on(device: torch.device) -> AbstractContextManager:
    """The device as the current one, which graphs and streams belong to."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _check_finite(finite: Tensor) -> None:
    if not finite:
        raise ValueError("the generator gives non-finite logits: its weights are damaged or overflow")


def _whole_numbers(name: str, values: Tensor | Sequence[int], end: int) -> list[int]:
    """`values` (B,) as a list; ValueError unless all are whole numbers in [0, end)."""
    numbers = values.tolist() if isinstance(values, Tensor) else np.asarray(values).tolist()
    if not isinstance(numbers, list) or not numbers:
        raise ValueError(f"{name} must be a sequence of at least one whole number, got {values!r}")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < end:
            raise ValueError(f"{name} must be whole numbers from 0 to {end - 1}, got {number!r}")
    return numbers
