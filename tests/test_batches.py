"""The batch size that is proposed fits, and cannot be much larger."""

import pytest
import torch

from llamagen_unitok import GPT, GPTConfig
from llamagen_unitok.sampling.batches import (
    MOST,
    SHARE,
    free_bytes,
    picture_bytes,
    propose_batch_size,
    second_copy_bytes,
)
from llamagen_unitok.sampling.blocks import FixedWeights, merged_bytes
from llamagen_unitok.sampling.kept import Kept
from llamagen_unitok.sampling.packed import PackedEngine
from llamagen_unitok.sampling.steps import Run
from tests.tiny_generator import tiny_gpt


def test_a_pictures_bytes_are_its_caches_and_a_little_more():
    gpt = tiny_gpt(num_positions=64)
    engine = PackedEngine(gpt, Run(torch.tensor([0]), (1.0,), None), Kept())
    cached = sum(t.nbytes for caches in (engine.caches, engine.head_caches) for pair in caches for t in pair)
    assert cached < picture_bytes(gpt.config, 4, guided=False) < 1.2 * cached
    assert picture_bytes(gpt.config, 4, guided=True) == 2 * picture_bytes(gpt.config, 4, guided=False)


def test_the_largest_sizes_caches_are_the_published_ones():
    # benchmarks: 19.4 GB of keys and values for 256 pictures of XXL in bf16.
    config = GPTConfig.preset("XXL")
    assert 256 * picture_bytes(config, 2, guided=False) == pytest.approx(19.4e9, rel=0.03)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("free", [0, 10**6, 3 * 10**6, 10**12])
def test_the_proposal_is_the_largest_power_of_two_that_fits(guided, free):
    gpt = tiny_gpt(num_positions=64)
    size = propose_batch_size(gpt, guided=guided, free=free)
    each, free = picture_bytes(gpt.config, 4, guided=guided), max(0, free - second_copy_bytes(gpt))
    assert size in {2**n for n in range(10)}
    assert size == 1 or size * each <= SHARE * free
    assert size == MOST["cpu"] or 2 * size * each > SHARE * free


def test_free_memory_is_a_share_of_what_the_machine_has():
    assert 10**7 < free_bytes(torch.device("cpu")) < 10**14


def test_half_precision_on_a_cpu_counts_float32_caches():
    config = GPTConfig.preset("B", num_classes=1, codebook_size=2)
    with torch.device("meta"):
        gpt = GPT(config)
    gpt = gpt.bfloat16()
    room = int(4.5 * picture_bytes(config, 4, guided=False) / SHARE)
    assert propose_batch_size(gpt, guided=False, free=room + second_copy_bytes(gpt)) == 4


def test_the_second_copy_of_the_weights_is_counted():
    gpt = tiny_gpt()
    linear = sum(p.nbytes for name, p in gpt.named_parameters() if p.ndim == 2 and "embed" not in name)
    tables = sum(table.weight.nbytes for table in gpt.output.codebooks)
    assert second_copy_bytes(gpt) == linear - tables
    room = int(8 * picture_bytes(gpt.config, 4, guided=False) / SHARE) + 1
    assert propose_batch_size(gpt, guided=False, free=room + second_copy_bytes(gpt)) == 8
    assert propose_batch_size(gpt, guided=False, free=room) < 8
    own = {p.data_ptr() for p in gpt.parameters()}
    weights = FixedWeights(gpt)
    held = [one for block in (*weights.layers, *weights.head_layers) for one in block if isinstance(one, torch.Tensor)]
    assert merged_bytes(gpt) == sum(one.nbytes for one in (*held, weights.codes) if one.data_ptr() not in own)


@pytest.mark.parametrize(("pictures", "size"), [(1, 1), (2, 2), (3, 4), (8, 8), (9, 16), (10**6, MOST["cpu"])])
def test_a_batch_is_no_larger_than_the_pictures_need(pictures, size):
    assert propose_batch_size(tiny_gpt(), guided=False, free=10**12, pictures=pictures) == size
