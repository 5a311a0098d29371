"""Guidance, filters, draws, seeds, and the decoding loop."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagen_unitok import SamplingConfig, generate
from llamagen_unitok.sampling import ENGINES, SCHEDULES, decode
from llamagen_unitok.sampling.engines import EagerEngine
from llamagen_unitok.sampling.filters import choose, draw, filter_logits
from llamagen_unitok.sampling.guidance import guidance_scales, guide
from llamagen_unitok.sampling.seeds import picture_uniforms, running_indices
from tests.tiny_generator import GROUPED, SINGLE, random_batch, tiny_gpt

GOLDEN = Path(__file__).parent / "golden" / "unitok_gpt_b_seed0.npz"
VARIANTS = pytest.mark.parametrize("changes", [{}, SINGLE, GROUPED], ids=["K=3", "K=1", "grouped"])


# --- filters and draws


@pytest.mark.parametrize(
    ("field", "filters"),
    [
        ("filter_temp_probs", {"temperature": 0.9}),
        ("filter_topk_probs", {"top_k": 7}),
        ("filter_topp_probs", {"top_p": 0.8}),
        ("filter_both_probs", {"temperature": 0.7, "top_k": 12, "top_p": 0.9}),
    ],
)
def test_filters_match_the_published_ones(field, filters):
    golden = np.load(GOLDEN)
    probs = filter_logits(torch.from_numpy(golden["filter_logits"][:, 0]), **filters).softmax(-1)
    torch.testing.assert_close(probs, torch.from_numpy(golden[field]), atol=1e-6, rtol=0)


def test_top_k_keeps_all_that_tie_with_the_kth():
    kept = filter_logits(torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]]), top_k=2).isfinite()
    assert kept.tolist() == [[False, True, True, True, False]]


def test_top_p_keeps_the_entry_that_passes_the_threshold():
    logits = torch.tensor([[0.1, 0.5, 0.4]]).log()
    assert filter_logits(logits, top_p=0.6).isfinite().tolist() == [[False, True, True]]
    assert filter_logits(logits, top_p=1e-9).isfinite().tolist() == [[False, True, False]]


def test_top_k_above_the_vocabulary_and_zero_keep_all():
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(filter_logits(logits, top_k=9), logits)
    assert torch.equal(filter_logits(logits, top_k=0), logits)


def naive_draw(probs: np.ndarray, uniform: np.float32) -> int:
    """Walk through the vocabulary, adding in double precision and comparing in single."""
    total, last = 0.0, 0
    for entry, prob in enumerate(probs):
        total += float(prob)
        if prob > 0:
            last = entry
            if np.float32(total) > uniform:
                return entry
    return last


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 0.0, 1e-6, 0.1, 1.0, 3.0]), min_size=1, max_size=40).filter(any),
    uniform=st.floats(0, 1, width=32, exclude_max=True),
)
def test_draw_takes_the_entry_of_the_naive_walk(weights, uniform):
    probs = np.asarray(weights, np.float32) / np.float32(sum(weights))
    taken = draw(torch.from_numpy(probs)[None], torch.tensor([uniform], dtype=torch.float32)).item()
    assert taken == naive_draw(probs, np.float32(uniform))
    assert probs[taken] > 0


def test_draw_skips_impossible_entries_and_stays_below_a_sum_short_of_one():
    probs = torch.tensor([[0.0, 0.5, 0.49, 0.0]]).expand(4, 4)
    assert draw(probs, torch.tensor([0.0, 0.4999, 0.5, 0.999])).tolist() == [1, 1, 2, 2]


def test_draws_on_an_even_grid_of_uniforms_have_the_distribution():
    probs = torch.rand(1, 30, generator=torch.Generator().manual_seed(0))
    probs /= probs.sum()
    uniforms = (torch.arange(10_000) + 0.5) / 10_000
    counts = draw(probs.expand(10_000, 30), uniforms).bincount(minlength=30)
    # Every interval of length p holds p·n grid points, give or take one.
    assert (counts - probs[0] * 10_000).abs().max() <= 1.01


def test_temperature_zero_takes_the_first_of_the_largest():
    logits = torch.tensor([[0.0, 2.0, 2.0]])
    assert choose(logits, torch.tensor([0.99]), temperature=0).item() == 1
    assert choose(logits.bfloat16(), torch.tensor([0.99]), temperature=1e-30, top_k=1).item() == 2


# --- guidance


def test_schedules_have_their_closed_forms():
    t = [p / 8 for p in range(8)]
    cosine = [(1 - math.cos(math.pi * x)) / 2 for x in t]
    assert set(SCHEDULES) == {"constant", "linear", "cosine", "power-cosine"}
    assert guidance_scales(8, 3.0) == [3.0] * 8
    assert guidance_scales(8, 3.0, "linear") == pytest.approx([1 + 2 * x for x in t])
    assert guidance_scales(8, 3.0, "cosine") == pytest.approx([1 + 2 * x for x in cosine])
    power = [(1 - math.cos(math.pi * x**2.5)) / 2 for x in t]
    assert guidance_scales(8, 3.0, "power-cosine", 2.5) == pytest.approx([1 + 2 * x for x in power])
    assert guidance_scales(8, 0.5, "power-cosine", 1.0) == pytest.approx([1 - x / 2 for x in cosine])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_scale_one_is_no_guidance_under_every_schedule(schedule):
    assert guidance_scales(8, 1.0, schedule, 2.0) == [1.0] * 8


def test_interval_guides_positions_up_to_its_end_plus_one():
    assert guidance_scales(6, 2.0, interval=0) == [2, 2, 1, 1, 1, 1]
    assert guidance_scales(6, 2.0, interval=3) == [2, 2, 2, 2, 2, 1]
    assert guidance_scales(6, 2.0, interval=99) == [2] * 6


def test_guided_logits_run_from_unconditional_through_conditional():
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    conditional, unconditional = logits.chunk(2)
    assert guide(logits, 2, 1.0) is not logits and torch.equal(guide(logits, 2, 1.0), conditional)
    assert torch.equal(guide(logits, 2, 0.0), unconditional)
    torch.testing.assert_close(guide(logits, 2, 2.5), 2.5 * conditional - 1.5 * unconditional)


@VARIANTS
def test_guided_decoding_mixes_the_logits_of_the_class_and_the_null_class(changes):
    gpt = tiny_gpt(**changes)
    labels, codes = random_batch(gpt)
    conditional, unconditional = gpt(labels, codes), gpt(torch.full_like(labels, 5), codes)
    scales = guidance_scales(9, 2.0, "linear", interval=4)

    def forced(logits, position, codebook):
        at = (slice(None), position, codebook)
        expected = unconditional[at] + scales[position] * (conditional[at] - unconditional[at])
        torch.testing.assert_close(logits, expected, atol=5e-5, rtol=0)
        return codes[at]

    decode(gpt, labels, forced, scales)


@pytest.mark.parametrize(
    ("guidance", "doubled_positions"),
    [({"cfg_scale": 1.0}, 0), ({"cfg_scale": 2.0}, 9), ({"cfg_scale": 2.0, "cfg_interval": 3}, 5)],
)
def test_the_unconditional_branch_runs_only_where_it_is_needed(guidance, doubled_positions, monkeypatch):
    rows = []

    class Spy(EagerEngine):
        def trunk(self, x, p):
            rows.append(len(x))
            return super().trunk(x, p)

    monkeypatch.setitem(ENGINES, "spy", Spy)
    generate(tiny_gpt(), [0, 1], engine="spy", **guidance)
    assert rows == [4] * doubled_positions + [2] * (9 - doubled_positions)


def test_scale_zero_ignores_the_class():
    gpt = tiny_gpt()
    assert torch.equal(
        generate(gpt, [0, 1], cfg_scale=0.0, indices=[3, 4]), generate(gpt, [2, 4], cfg_scale=0.0, indices=[3, 4])
    )


# --- seeds


def test_uniforms_follow_from_seed_and_index_alone():
    uniforms = picture_uniforms(7, [0, 5, 2**40], 9, 3)
    assert uniforms.dtype == torch.float32
    for row, index in enumerate((0, 5, 2**40)):
        stream = np.random.Generator(np.random.Philox(key=np.array([7, index], np.uint64)))
        assert np.array_equal(uniforms[row], stream.random((9, 3), dtype=np.float32))
    assert torch.equal(picture_uniforms(7, [5], 9, 3)[0], uniforms[1])
    assert not torch.equal(picture_uniforms(8, [5], 9, 3)[0], uniforms[1])


def test_indices_count_pictures_within_their_class():
    assert running_indices([5, 7, 5, 5, 7]) == [0, 0, 1, 2, 1]
    gpt = tiny_gpt()
    assert torch.equal(generate(gpt, [1, 2, 1]), generate(gpt, [1, 2, 1], indices=[0, 0, 1]))


@VARIANTS
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
@pytest.mark.parametrize("batch", [2, 5, 8])
def test_codes_do_not_depend_on_order_or_neighbours(changes, cfg_scale, batch):
    gpt = tiny_gpt(**changes)
    labels, _ = random_batch(gpt, batch)
    indices = torch.arange(batch)
    codes = generate(gpt, labels, indices=indices, cfg_scale=cfg_scale)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(0))
    assert torch.equal(generate(gpt, labels[order], indices=indices[order], cfg_scale=cfg_scale), codes[order])
    others = (labels + 1) % 5
    others[-1] = labels[0]
    neighbours = generate(gpt, others, indices=[*range(100, 99 + batch), 0], cfg_scale=cfg_scale)
    assert torch.equal(neighbours[-1], codes[0])


def test_wider_codes_do_not_depend_on_order():
    # Wide enough for blocked matrix products, which a tiny model never reaches.
    gpt = tiny_gpt(width=256, codebook_size=1024, num_positions=4)
    labels, _ = random_batch(gpt, 7)
    indices = torch.arange(7)
    codes = generate(gpt, labels, indices=indices, cfg_scale=1.5)
    assert torch.equal(generate(gpt, labels.flip(0), indices=indices.flip(0), cfg_scale=1.5), codes.flip(0))


def test_seeds_and_labels_change_the_codes_and_greedy_ignores_the_seed():
    gpt = tiny_gpt()
    codes = generate(gpt, [1], seed=0)
    assert not torch.equal(generate(gpt, [1], seed=1), codes)
    assert not torch.equal(generate(gpt, [2], seed=0), codes)
    assert torch.equal(generate(gpt, [1], seed=0, temperature=0), generate(gpt, [1], seed=1, temperature=0))


# --- generate


def test_greedy_codes_are_the_best_teacher_forced_ones():
    gpt = tiny_gpt()
    labels = torch.tensor([0, 3])
    codes = generate(gpt, labels, temperature=0)
    assert torch.equal(gpt(labels, codes).argmax(-1), codes)


@VARIANTS
def test_codes_have_shape_and_range_in_bfloat16(changes):
    gpt = tiny_gpt(**changes).bfloat16()
    codes = generate(gpt, [0, 1, 2, 3], cfg_scale=1.5, top_k=5, top_p=0.9)
    assert codes.shape == (4, 9, gpt.config.num_codebooks)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < 11


def test_generating_leaves_the_mode_alone_and_its_codes_can_be_trained_on():
    gpt = tiny_gpt()
    expected = generate(gpt, [0, 1])
    gpt.train()
    codes = generate(gpt, [0, 1])
    assert gpt.training
    assert torch.equal(codes, expected)
    gpt.loss(torch.tensor([0, 1]), codes).backward()


def test_the_mode_comes_back_after_an_error():
    gpt = tiny_gpt().train()
    with pytest.raises(ValueError, match=r"unknown engine 'warp'.*eager"):
        generate(gpt, [0], engine="warp")
    assert gpt.training


@pytest.mark.parametrize(
    ("setting", "value", "flag"),
    [
        ("cfg_scale", -1.0, "--cfg"),
        ("cfg_scale", math.nan, "--cfg"),
        ("cfg_scale", math.inf, "--cfg"),
        ("cfg_schedule", "step", "--cfg-schedule"),
        ("cfg_power", 0.0, "--cfg-power"),
        ("cfg_interval", -1, "--cfg-interval"),
        ("temperature", -0.1, "--temperature"),
        ("temperature", math.nan, "--temperature"),
        ("top_k", -1, "--top-k"),
        ("top_k", 2.5, "--top-k"),
        ("top_p", 0.0, "--top-p"),
        ("top_p", 1.5, "--top-p"),
        ("seed", -1, "--seed"),
        ("seed", 2**64, "--seed"),
    ],
)
def test_wrong_settings_are_refused_naming_the_flag_and_the_value(setting, value, flag):
    with pytest.raises(ValueError, match=rf"{flag} \({setting}\).*{value}") as error:
        SamplingConfig(**{setting: value})
    assert "\n" not in str(error.value)


def test_guidance_without_a_null_class_is_refused_with_the_remedy():
    gpt = tiny_gpt(has_null_class=False)
    generate(gpt, [0])
    for scale in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"--cfg.*label dropout.*use --cfg 1"):
            generate(gpt, [0], cfg_scale=scale)


@pytest.mark.parametrize("labels", [[5], [-1], [], [0.5], [True], 3, [[1]]])
def test_wrong_labels_are_refused(labels):
    with pytest.raises(ValueError, match="labels"):
        generate(tiny_gpt(), labels)


def test_labels_may_come_as_list_array_or_tensor():
    gpt = tiny_gpt()
    expected = generate(gpt, [1, 2])
    assert torch.equal(generate(gpt, np.array([1, 2])), expected)
    assert torch.equal(generate(gpt, torch.tensor([1, 2])), expected)


@pytest.mark.parametrize("indices", [[0], [0, -1], [0, 1.5]])
def test_wrong_indices_are_refused(indices):
    with pytest.raises(ValueError, match="indices"):
        generate(tiny_gpt(), [0, 1], indices=indices)


def test_damaged_weights_are_noticed_before_the_first_code():
    gpt = tiny_gpt()
    gpt.norm.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="non-finite"):
        generate(gpt, [0])
