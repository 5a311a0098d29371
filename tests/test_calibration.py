"""Calibrating a generator's temperature: the loss at the found scale is the least, and is the loss of what is saved."""

import numpy as np
import pytest
import torch

from demo.calibrate import RANGE, calibrate
from llamagen_unitok.training.data import CodeMeta, write_meta, write_shard
from modelfolder import file_hash
from tests.tiny_generator import TINY, tiny_gpt


def test_calibrated_logits_have_the_least_loss_over_a_fine_grid(tmp_path):
    gpt = tiny_gpt()
    with torch.no_grad():
        gpt.output.linear_head.weight.mul_(3)  # over-confident, so that the best temperature is inside the range
    rng = np.random.default_rng(0)
    codes = rng.integers(TINY["codebook_size"], size=(40, 1, TINY["num_positions"], TINY["num_codebooks"]))
    labels = rng.integers(TINY["num_classes"], size=40)
    with torch.inference_mode():  # codes that the generator finds likely: its own favourites half of the time
        best = gpt(torch.from_numpy(labels), torch.from_numpy(codes[:, 0])).argmax(-1).numpy()
    codes[:, 0] = np.where(rng.random(best.shape) < 0.5, best, codes[:, 0])
    path = write_shard(tmp_path, 0, 1, codes, labels)
    write_meta(
        tmp_path,
        CodeMeta(
            tokenizer="none", tokenizer_hash="0", img_size=48, grid=3, num_codebooks=TINY["num_codebooks"],
            codebook_size=TINY["codebook_size"], views=["centre"], class_names=list("abcde"), shard_sizes=[40],
            checksums=[file_hash(path)],
        ),
    )  # fmt: skip
    given = torch.from_numpy(labels), torch.from_numpy(codes[:, 0])
    with torch.inference_mode():
        logits = gpt(*given).double()
    grid = np.linspace(*RANGE, 401)
    losses = [torch.nn.functional.cross_entropy((logits / t).flatten(0, 2), given[1].flatten()).item() for t in grid]
    temperature, before, after = calibrate(gpt, tmp_path, pictures=40)
    assert temperature == pytest.approx(grid[np.argmin(losses)], abs=0.02)
    assert after == pytest.approx(min(losses), abs=1e-2) and after < before
    assert gpt.loss(*given).item() == pytest.approx(after, abs=1e-2)
