"""Costs of a training step: against the table of shared estimates, a count by hooks, and a real backward."""

import gc
from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llamagen_unitok import GPT, GPTConfig
from llamagen_unitok.runtime.parallel import wrap_blocks
from llamagen_unitok.training.flops import (
    activations,
    duration,
    flops_per_image,
    memory,
    parameters,
    peak_flops,
    spelled_hours,
)
from llamagen_unitok.training.generator import GeneratorObjective
from tests.tiny_generator import GROUPED, SINGLE, TINY, random_batch

# TFLOP per image of the trunk, of attention, of the head, and of all; images/s at 50 % of 989 TFLOP/s; counted by hand
# from the published sizes, independently of this code, and rounded to the digits given.
TABLE = {
    "B": (0.130, 0.004, 0.387, 0.521, 0.74, 949),
    "L": (0.474, 0.010, 0.683, 1.167, 0.59, 424),
    "XL": (1.123, 0.018, 1.063, 2.205, 0.48, 224),
    "XXL": (2.087, 0.029, 1.469, 3.586, 0.41, 138),
}


@pytest.mark.parametrize("size", TABLE)
def test_flops_of_the_published_sizes(size):
    trunk, attention, head, total, share, rate = TABLE[size]
    flops = flops_per_image(GPTConfig.preset(size))
    for ours, theirs in zip((*flops, flops.total), (trunk, attention, head, total), strict=True):
        assert ours / 1e12 == pytest.approx(theirs, abs=1.1e-3)
    assert round(flops.head_share, 2) == share
    assert duration(flops, 1, devices=1, peak=989e12, mfu=0.5).images_per_sec == pytest.approx(rate, abs=1)


def test_xxl_trains_at_138_images_per_second_and_3_586_tflop():
    flops = flops_per_image(GPTConfig.preset("XXL"))
    assert f"{flops.total / 1e12:.3f}" == "3.586"
    epoch = duration(flops, 1_281_167, devices=1, peak=989e12, mfu=0.5)
    assert epoch.hours == pytest.approx(2.58, abs=0.005) and round(epoch.images_per_sec) == 138
    eight = duration(flops, 1_281_167, devices=8, peak=989e12, mfu=0.5)
    assert eight.device_hours == pytest.approx(epoch.hours) and eight.hours == pytest.approx(epoch.hours / 8)


@pytest.mark.parametrize("changes", [{}, GROUPED, SINGLE, {"width": 64}], ids=["K=3", "grouped", "K=1", "wide"])
def test_matrix_flops_are_those_that_torch_counts(changes):
    from torch.utils.flop_counter import FlopCounterMode

    config = GPTConfig(**{**TINY, **changes})
    gpt = GPT(config)
    # The counter counts attention as a full square, and outside of linear layers nothing else multiplies.
    with FlopCounterMode(display=False) as counter:
        gpt(*random_batch(gpt, batch=2), return_loss=True).backward()
    linear = sum(
        count
        for operation, count in counter.get_flop_counts()["Global"].items()
        if operation in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )
    flops = flops_per_image(config)
    assert linear == 2 * (flops.trunk + flops.head)


def test_a_share_of_the_positions_speeds_xxl_up_by_1_44():
    whole, quarter = (flops_per_image(GPTConfig.preset("XXL"), share).total for share in (1.0, 0.25))
    assert whole / quarter == pytest.approx(1.44, abs=0.01)


def test_parameters_are_counted_by_part():
    counted = parameters(GPTConfig.preset("XXL", has_null_class=False))
    assert counted.total == sum(p.numel() for p in _on_meta("XXL").parameters())
    assert counted.trunk / 1e9 == pytest.approx(1.359, abs=5e-4)
    assert counted.head / 1e9 == pytest.approx(0.164, abs=5e-4)
    assert counted.total / 1e9 == pytest.approx(1.575, abs=1e-3)


def _on_meta(size: str) -> GPT:
    with torch.device("meta"):
        return GPT(GPTConfig.preset(size, has_null_class=False))


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("bf16", [True, False])
def test_activations_are_what_a_real_forward_keeps(share, bf16):
    config = GPTConfig(**{**TINY, "num_positions": 16, "layers": 5})
    gpt = GPT(config).train()
    labels, codes = random_batch(gpt, batch=5)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, note), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        gpt(labels, codes, return_loss=True, head_share=share)
    own = {t.untyped_storage().data_ptr() for t in (*gpt.parameters(), *gpt.buffers(), labels, codes)}
    real = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)
    counted = activations(config, share, bf16)
    assert counted.fixed + 5 * counted.per_image == pytest.approx(real, rel=0.02)


class Living(TorchDispatchMode):
    """Storages that operations make; `bytes` are those of the ones that still live."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes(self, own: set[int]) -> int:
        return sum(size for address, (ref, size) in self.made.items() if not ref.expired() and address not in own)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_recomputed_activations_are_what_lives_after_a_real_forward_and_one_block(recompute, bf16):
    config = GPTConfig(**{**TINY, "num_positions": 16, "layers": 5})
    gpt = GPT(config).train()
    wrap_blocks(GeneratorObjective(gpt, 0.0).blocks(), recompute, compiled=False)
    labels, codes = random_batch(gpt, batch=5)
    with Living() as living, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = gpt(labels, codes, return_loss=True)
    gc.collect()
    own = {t.untyped_storage()._cdata for t in (*gpt.parameters(), *gpt.buffers(), labels, codes, loss)}
    real = living.bytes(own)
    counted = activations(config, 1.0, bf16, recompute)
    counted = counted.fixed + 5 * counted.per_image
    if recompute == "none":
        assert counted == pytest.approx(real, rel=0.02)
    else:
        # the depth head's blocks are the larger ones: K = 3 steps at each position
        two, one = (activations(replace(config, depth_layers=n), 1.0, bf16) for n in (2, 1))
        block = two.fixed - one.fixed + 5 * (two.per_image - one.per_image)
        assert real < counted <= 1.02 * (real + block)
        whole = activations(config, 1.0, bf16)
        assert counted < 0.8 * (whole.fixed + 5 * whole.per_image)
    if recompute == "full":
        kept_already = 5 * 16 * 3 * config.width * 4  # a block's input, float32
        assert counted == pytest.approx(real + block - kept_already, rel=0.02)


def test_memory_is_16_bytes_a_parameter_shared_by_the_shards():
    config = GPTConfig(**TINY)
    total = parameters(config).total
    one, four = memory(config, batch=2), memory(config, batch=2, shards=4)
    assert one.weights + one.gradients + one.optimizer == 16 * total and one.average == 0
    assert four.weights + four.gradients + four.optimizer == 4 * total
    assert four.activations == one.activations < memory(config, batch=3).activations
    assert memory(config, batch=2, ema=True).average == 4 * total
    # shards of the gradients are made of whole ones, which a step of several parts holds on to
    assert memory(config, batch=2, shards=4, accumulate=2).gradients == 5 * total
    assert memory(config, batch=2, accumulate=2) == one


def test_the_peak_is_the_given_one_or_unknown_on_a_cpu():
    assert peak_flops(torch.device("cpu")) is None
    assert peak_flops(torch.device("cpu"), 2.5) == 2.5e12


@pytest.mark.parametrize(("hours", "text"), [(0.2, "12 min"), (5.25, "5.2 h"), (47.9, "47.9 h"), (71.9, "3 d 0 h")])
def test_hours_are_spelled(hours, text):
    assert spelled_hours(hours) == text
