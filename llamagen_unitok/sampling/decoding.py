"""Decoding: position by position and, within a position, codebook by codebook."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llamagen_unitok.gpt import GPT
from llamagen_unitok.sampling.engines import make_engine
from llamagen_unitok.sampling.filters import choose
from llamagen_unitok.sampling.guidance import guide
from llamagen_unitok.sampling.seeds import MAX_SEED, picture_uniforms, running_indices
from llamagen_unitok.sampling.settings import SamplingConfig

# Logits (B, V) at (position, codebook) → codes (B,).
Chooser = Callable[[Tensor, int, int], Tensor]


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

    def sample(logits: Tensor, position: int, codebook: int) -> Tensor:
        return choose(logits, uniforms[:, position, codebook], temperature, top_k, top_p)

    return decode(
        gpt,
        torch.tensor(label_list, dtype=torch.int64, device=device),
        sample,
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
    Dropout is off during the call, whatever the generator's mode, which is left as it was.
    """
    batch, positions = labels.shape[0], len(scales)
    guided = max((p + 1 for p, scale in enumerate(scales) if scale != 1), default=0)
    # Allocated before inference mode, so that the caller can train on them.
    codes = torch.empty(batch, positions, gpt.config.num_codebooks, dtype=torch.int64, device=labels.device)
    was_training = gpt.training
    gpt.eval()
    try:
        with torch.inference_mode():
            rows = labels if not guided else torch.cat((labels, torch.full_like(labels, gpt.config.num_classes)))
            steps = make_engine(engine, gpt, len(rows))
            for p in tqdm(range(positions), desc="generating", unit="position", disable=not progress, leave=False):
                both = 2 if p < guided else 1
                if p == 0:
                    hidden = steps.begin(rows)
                else:
                    if p == guided:
                        steps.keep_rows(batch)
                    hidden = steps.advance(codes[:, p - 1].repeat(both, 1))
                previous = None
                for k in range(gpt.config.num_codebooks):
                    logits = guide(steps.head(hidden, previous).float(), batch, scales[p])  # (B, V)
                    if p == 0 and k == 0 and not logits.isfinite().all():
                        raise ValueError("the generator gives non-finite logits: its weights are damaged or overflow")
                    codes[:, p, k] = chooser(logits, p, k)
                    previous = codes[:, p, k].repeat(both)
    finally:
        gpt.train(was_training)
    return codes


def _whole_numbers(name: str, values: Tensor | Sequence[int], end: int) -> list[int]:
    """`values` (B,) as a list; ValueError unless all are whole numbers in [0, end)."""
    numbers = values.tolist() if isinstance(values, Tensor) else np.asarray(values).tolist()
    if not isinstance(numbers, list) or not numbers:
        raise ValueError(f"{name} must be a sequence of at least one whole number, got {values!r}")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < end:
            raise ValueError(f"{name} must be whole numbers from 0 to {end - 1}, got {number!r}")
    return numbers
