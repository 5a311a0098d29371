"""Weights of one byte: near to the exact ones, each row by itself, and only where asked for."""

import pytest
import torch

from llamagen_unitok import generate
from llamagen_unitok.sampling import decode, engine_name, int8
from llamagen_unitok.sampling.engines import engine_class
from llamagen_unitok.sampling.int8 import has_int8, pack_int8
from tests.tiny_generator import GROUPED, SINGLE, random_batch, tiny_gpt

needed = pytest.mark.skipif(not has_int8(), reason="this CPU or torch has no int8 products")
WIDE = {"width": 256, "codebook_size": 1024, "num_positions": 4}


@needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_near_the_exact_one_and_each_row_is_by_itself(dtype):
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(shape, generator=generator) for shape in ((300, 256), (300,), (7, 256)))
    weight[5] = 0
    x = (x * torch.tensor([1.0, 100.0, 1e-3, 1.0, 0.0, 1.0, 1.0])[:, None]).to(dtype)
    linear = pack_int8(weight.to(dtype), bias, 7)
    y, exact = linear(x), x.float() @ weight.to(dtype).float().T + bias
    assert y.dtype == dtype
    off = (y.float() - exact).norm(dim=1) / exact.norm(dim=1)
    assert off.max() < 0.012  # a uniform rounding error of 1/127 of the largest of both, over 256 products
    assert torch.equal(linear(x.flip(0)).flip(0), y)
    assert torch.equal(linear(x[:3]), y[:3])


@needed
@pytest.mark.parametrize("changes", [WIDE, {**WIDE, **SINGLE}, {**WIDE, **GROUPED}], ids=["K=3", "K=1", "grouped"])
@pytest.mark.parametrize("batch", [1, 5])
def test_logits_are_near_the_exact_ones(changes, batch):
    gpt = tiny_gpt(**changes)
    labels, codes = random_batch(gpt, batch)
    exact = gpt(labels, codes)
    seen = []

    def forced(logits, position, codebook):
        seen.append(logits)
        return codes[:, position, codebook]

    decode(gpt, labels, forced, [1.0] * 4, engine="int8")
    off = (torch.stack(seen, 1).view_as(exact) - exact).square().mean().sqrt()
    assert 0 < off < 0.06 * exact.std()  # a hundredth a layer, with none of a trained model's residual stream


@needed
def test_codes_depend_neither_on_order_nor_on_neighbours():
    gpt = tiny_gpt(**WIDE)
    labels, _ = random_batch(gpt, 7)
    codes = generate(gpt, labels, indices=range(7), cfg_scale=1.5, engine="int8")
    flipped = generate(gpt, labels.flip(0), indices=range(6, -1, -1), cfg_scale=1.5, engine="int8")
    assert torch.equal(flipped.flip(0), codes)


@needed
def test_the_exact_engine_of_the_same_generator_stays_exact():
    gpt = tiny_gpt()
    expected = generate(gpt, [0, 1], engine="packed")
    generate(gpt, [0, 1], engine="int8")
    assert torch.equal(generate(gpt, [0, 1], engine="packed"), expected)


def test_it_is_never_chosen_by_itself_and_only_for_a_cpu_that_can(monkeypatch):
    assert {engine_name("auto", kind, large_run=large) for kind in ("cpu", "cuda") for large in (False, True)} == {
        "packed", "graph", "compiled"
    }  # fmt: skip
    with pytest.raises(ValueError, match="--engine int8 runs on a CPU only, not on cuda"):
        engine_class("int8", "cuda")
    monkeypatch.setattr(int8, "has_int8", lambda: False)
    with pytest.raises(ValueError, match="--engine int8 needs oneDNN"):
        generate(tiny_gpt(), [0], engine="int8")
