"""Every engine gives the plain engine's codes, draws what the filters say, and leaves nothing to the host."""

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from benchmarks.kernel_count import count_kernels
from llamagen_unitok import generate
from llamagen_unitok.sampling import ENGINES, decode, fixed, release
from llamagen_unitok.sampling.blocks import FixedWeights, finish
from llamagen_unitok.sampling.draws import Draw, choose_on_cpu
from llamagen_unitok.sampling.engines import engine_class
from llamagen_unitok.sampling.filters import choose, filter_logits
from llamagen_unitok.sampling.fixed import FixedEngine
from llamagen_unitok.sampling.guidance import guidance_scales
from llamagen_unitok.sampling.kept import Kept, kept_for
from llamagen_unitok.sampling.packed import PackedEngine
from llamagen_unitok.sampling.seeds import picture_uniforms
from llamagen_unitok.sampling.steps import Run
from tests.compiler import AUTO_ON_CPU, NATIVE
from tests.tiny_generator import GROUPED, SINGLE, random_batch, tiny_gpt

VARIANTS = pytest.mark.parametrize("changes", [{}, SINGLE, GROUPED], ids=["K=3", "K=1", "grouped"])
COMPILED = pytest.param("compiled", marks=pytest.mark.slow)
OTHERS = pytest.mark.parametrize("engine", ["packed", NATIVE, "graph", COMPILED])
WIDE = {"width": 256, "codebook_size": 1024, "num_positions": 4}  # enough for blocked matrix products
SAMPLINGS = [
    {},
    {"cfg_scale": 2.0, "temperature": 0.9},
    {"cfg_scale": 1.5, "cfg_schedule": "linear", "cfg_interval": 3, "top_k": 7, "top_p": 0.9},
]
FILTERS = [
    {},
    {"temperature": 0.7},
    {"temperature": 2.0},
    {"top_k": 5},
    {"top_p": 0.8},
    {"temperature": 0.9, "top_k": 12, "top_p": 0.9},
]


def test_every_engine_is_tested_here():
    assert set(ENGINES) == {"eager", "packed", "native", "int8", "graph", "compiled"}  # int8: test_native.py
    assert engine_class("auto", "cpu") is ENGINES[AUTO_ON_CPU]
    assert engine_class("auto", "cuda") is ENGINES["graph"]
    assert engine_class("auto", "mps") is ENGINES["eager"]


# --- codes and logits


@VARIANTS
@OTHERS
def test_codes_are_those_of_the_plain_engine_for_eight_seeds(changes, engine):
    gpt = tiny_gpt(**changes)
    for seed in range(8):
        sampling = SAMPLINGS[seed % len(SAMPLINGS)]
        expected = generate(gpt, [0, 3, 1], seed=seed, engine="eager", **sampling)
        assert torch.equal(generate(gpt, [0, 3, 1], seed=seed, engine=engine, **sampling), expected)


@VARIANTS
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@OTHERS
def test_cached_logits_are_the_teacher_forced_ones(changes, batch, scale, engine):
    gpt = tiny_gpt(**changes)
    labels, codes = random_batch(gpt, batch)
    conditional, unconditional = gpt(labels, codes), gpt(torch.full_like(labels, 5), codes)
    scales = guidance_scales(9, scale, "linear", interval=4)

    def forced(logits, position, codebook):
        at = (slice(None), int(position), codebook)
        expected = unconditional[at] + scales[int(position)] * (conditional[at] - unconditional[at])
        torch.testing.assert_close(logits, expected, atol=5e-5, rtol=0)
        return codes[at]

    assert torch.equal(decode(gpt, labels, forced, scales, engine=engine), codes)


@pytest.mark.parametrize("engine", ["packed", NATIVE, "graph"])
def test_bfloat16_logits_are_as_near_to_float32_as_those_of_the_plain_engine(engine):
    gpt, rounded = tiny_gpt(**WIDE), tiny_gpt(**WIDE).bfloat16()
    labels, codes = random_batch(gpt, 6)
    exact = gpt(labels, codes)

    def error(name: str) -> float:
        seen = []

        def forced(logits, position, codebook):
            seen.append(logits)
            return codes[:, int(position), codebook]

        decode(rounded, labels, forced, [1.0] * 4, engine=name)
        return (torch.stack(seen, 1).view_as(exact) - exact).square().mean().sqrt().item()

    assert 0 < error(engine) < 1.2 * error("eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [2, 7, 8])
@pytest.mark.parametrize("engine", ["eager", "packed", NATIVE, "graph"])
def test_codes_depend_neither_on_order_nor_on_neighbours(engine, batch, dtype):
    gpt = tiny_gpt(**WIDE).to(dtype)
    labels, _ = random_batch(gpt, batch)
    indices = torch.arange(batch)
    codes = generate(gpt, labels, indices=indices, cfg_scale=1.5, engine=engine)
    flipped = generate(gpt, labels.flip(0), indices=indices.flip(0), cfg_scale=1.5, engine=engine)
    assert torch.equal(flipped, codes.flip(0))
    others = [*((labels[:-1] + 1) % 5).tolist(), int(labels[0])]
    beside = generate(gpt, others, indices=[*range(50, 49 + batch), 0], cfg_scale=1.5, engine=engine)
    assert torch.equal(beside[-1], codes[0])


@pytest.mark.parametrize("engine", ["eager", "packed", NATIVE, "graph"])
def test_damaged_weights_are_noticed(engine):
    gpt = tiny_gpt()
    with torch.no_grad():
        gpt.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="non-finite"):
        generate(gpt, [0], engine=engine)


# --- draws


@settings(max_examples=300, deadline=None)
@given(
    logits=st.lists(st.sampled_from([-30.0, -2.0, -1.0, 0.0, 0.5, 0.5000001, 3.0]), min_size=2, max_size=40),
    uniform=st.one_of(st.floats(0, 1, width=32, exclude_max=True), st.just(1 - 2**-24)),
    temperature=st.sampled_from([0.0, 1e-30, 0.3, 1.0, 1.7]),
    top_k=st.integers(0, 45),
    top_p=st.one_of(st.just(1.0), st.floats(1e-6, 1.0)),
)
def test_the_draw_of_a_cpu_takes_the_entries_of_the_plain_draw(logits, uniform, temperature, top_k, top_p):
    rows = torch.tensor([logits, logits[::-1]])
    uniforms = torch.tensor([uniform, 1 - 2**-24 - uniform if uniform < 0.5 else 0.0])
    expected = choose(rows, uniforms, temperature, top_k, top_p)
    assert torch.equal(choose_on_cpu(rows, uniforms, temperature, top_k, top_p), expected)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("device_side", [False, True])
def test_drawn_entries_have_the_filtered_distribution(filters, device_side):
    settings_ = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **filters}
    logits = 1.5 * torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    count = 4000
    draw = Draw(picture_uniforms(3, range(count), 2, 2), **settings_)
    drawn = draw(logits.expand(count, 20), torch.tensor([1]) if device_side else 1, 1).bincount(minlength=20)
    probs = filter_logits(logits, **settings_).softmax(-1)[0]
    possible = (probs > 0).numpy()
    assert not drawn.numpy()[~possible].any()
    expected = probs.double().numpy()[possible] * count
    # The uniforms are fixed, so this holds or not for good; a wrong distribution gives values like 1e-20.
    assert chisquare(drawn.numpy()[possible], expected * count / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize("engine", ["eager", "packed", NATIVE, "graph"])
def test_sampled_first_codes_have_the_distribution_of_their_logits(engine):
    gpt = tiny_gpt(num_positions=1)
    count = 2000
    codes = generate(gpt, [2] * count, engine=engine, temperature=0.8, top_k=6)
    labels, shown = torch.tensor([2]), torch.zeros(1, 1, 3, dtype=torch.int64)
    probs = filter_logits(gpt(labels, shown)[:, 0, 0], 0.8, 6).softmax(-1)[0]
    counts, possible = np.bincount(codes[:, 0, 0], minlength=11), (probs > 0).numpy()
    assert not counts[~possible].any()
    expected = probs.detach().double().numpy()[possible]
    assert chisquare(counts[possible], count * expected / expected.sum()).pvalue > 1e-3


# --- what is kept


@pytest.mark.parametrize("engine", ["eager", "packed", NATIVE, "graph"])
def test_a_later_run_uses_the_same_memory_and_a_changed_weight_is_seen(engine, monkeypatch):
    built = []
    plain_get = Kept.get

    def counting_get(self, kind, key, build):
        return plain_get(self, kind, key, lambda: built.append(kind) or build())

    monkeypatch.setattr(Kept, "get", counting_get)
    gpt = tiny_gpt()
    first = generate(gpt, [0, 1], engine=engine)
    parts = len(built)
    assert parts
    assert torch.equal(generate(gpt, [0, 1], engine=engine), first)
    assert len(built) == parts
    with torch.no_grad():
        gpt.layers[0].feed_forward.w1.weight.mul_(-1)
    changed = generate(gpt, [0, 1], engine=engine)
    assert len(built) == 2 * parts
    release(gpt)
    assert torch.equal(changed, generate(gpt, [0, 1], engine="eager"))
    assert not torch.equal(changed, first)


@pytest.mark.parametrize("change", [lambda gpt: gpt.float(), lambda gpt: gpt.to("cpu")], ids=["float", "to"])
def test_a_table_that_moved_is_seen(change):
    gpt = tiny_gpt()
    with kept_for(gpt) as before:
        pass
    with kept_for(gpt) as same:
        assert same is before
    old = gpt.rope.table  # so that the new one is elsewhere
    change(gpt)
    assert gpt.rope.table.data_ptr() != old.data_ptr()
    with kept_for(gpt) as after:
        assert after is not before


@pytest.mark.parametrize("engine", ["eager", "packed", NATIVE, "graph"])
def test_what_is_kept_does_not_keep_the_generator(engine):
    gpt = tiny_gpt()
    generate(gpt, [0], engine=engine)
    gone = weakref.ref(gpt)
    del gpt
    gc.collect()
    assert gone() is None


def test_a_run_inside_another_has_memory_of_its_own():
    gpt = tiny_gpt()
    labels = torch.tensor([0, 1])
    expected = generate(gpt, labels, temperature=0)

    def nested(logits, position, codebook):
        generate(gpt, [3, 4], temperature=0)
        return logits.argmax(-1)

    assert torch.equal(decode(gpt, labels, nested, [1.0] * 9), expected)


def test_matrices_in_half_precision_or_without_packing_still_give_codes(monkeypatch):
    monkeypatch.setattr("llamagen_unitok.sampling.packed._has_blocked", lambda dtype: False)
    gpt = tiny_gpt()
    assert torch.equal(generate(gpt, [0, 1], engine="packed"), generate(gpt, [0, 1], engine="eager"))
    assert generate(gpt.half(), [0, 1], engine="packed").shape == (2, 9, 3)


# --- the step of fixed shape


def fixed_step(rows: int, guided: bool, **filters):
    gpt = tiny_gpt()
    settings_ = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **filters}
    run = Run(torch.arange(rows), (2.0 if guided else 1.0,) * 9, Draw(torch.rand(rows, 9, 3), **settings_))
    return FixedEngine(gpt, run, Kept())


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("guided", [False, True])
def test_a_step_asks_nothing_of_the_host(filters, guided):
    with torch.inference_mode():
        engine = fixed_step(2, guided, **filters)
        # Fake tensors have shapes and no values: whatever reads one raises.
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            with pytest.raises(DataDependentOutputException):
                mode.from_tensor(torch.ones(1)).item()
            engine.step(4 if guided else 2, 9)


def test_steps_read_a_few_lengths_that_hold_their_position():
    engine = fixed_step(1, False)
    lengths = [engine.length_at(p) for p in range(9)]
    assert all(length > p for p, length in enumerate(lengths))
    assert lengths == [3, 3, 3, 6, 6, 6, 9, 9, 9]


def test_fused_norms_and_summed_embeddings_are_exact_in_float32():
    gpt = tiny_gpt(width=256, num_codebooks=8)
    weights, codes = FixedWeights(gpt), torch.randint(11, (40, 8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(weights.embed(codes), gpt.tok_embeddings(codes))
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(1))
    assert torch.equal(finish(x, weights.last), gpt.norm(x))


class OneKernelEach:
    """What kernels.py offers, as one operation each: to count, not to compute."""

    LARGEST_VOCABULARY = 11

    @staticmethod
    def attend(qkv, cache, position, heads, turns):
        return qkv.new_zeros(len(qkv), heads * qkv.shape[-1])

    @staticmethod
    def guided_choice(logits, uniforms, *_):
        return logits[: len(uniforms)].argmax(-1)


def kernels_of_a_step(layers: int, depth_layers: int, dtype: torch.dtype) -> int:
    gpt = tiny_gpt(num_codebooks=8, layers=layers, depth_layers=depth_layers).to(dtype)
    run = Run(torch.arange(2), (1.0,) * 9, Draw(torch.rand(2, 9, 8), 0.9, 5, 0.9))
    with torch.inference_mode():
        engine = FixedEngine(gpt, run, Kept())
    return count_kernels(lambda: engine.step(2, 9)).total()


# Of a trunk layer, of a depth layer over all eight codes, and of all the rest with a trunk and a depth layer taken off.
@pytest.mark.parametrize(
    ("ours", "dtype", "trunk", "head", "rest"),
    [
        (True, torch.bfloat16, 9, 72, 43),
        (True, torch.float32, 9, 72, 43),
        (False, torch.bfloat16, 13, 79, 320),
        (False, torch.float32, 11, 79, 320),
    ],
)
def test_a_layer_runs_few_kernels(monkeypatch, ours, dtype, trunk, head, rest):
    if ours:
        monkeypatch.setattr(fixed, "KERNELS", {"cpu": "ours"})
        monkeypatch.setattr(fixed, "_load", lambda name: OneKernelEach)
    least = kernels_of_a_step(1, 1, dtype)
    assert kernels_of_a_step(2, 1, dtype) - least <= trunk
    assert kernels_of_a_step(1, 2, dtype) - least <= head
    assert least - trunk - head <= rest


def test_packed_caches_are_only_read_up_to_the_position():
    gpt = tiny_gpt()
    run = Run(torch.tensor([0, 1]), (1.0,) * 9, lambda logits, p, k: logits.argmax(-1))
    with torch.inference_mode():
        engine = PackedEngine(gpt, run, Kept())
        for keys, values in (*engine.caches, *engine.head_caches):
            keys.fill_(torch.nan)
            values.fill_(torch.nan)
        for p in range(9):
            engine.position(p)
        assert engine.finite
    assert torch.equal(engine.codes, generate(gpt, [0, 1], temperature=0, engine="eager"))


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["graph", "compiled"])
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_graphs_give_the_codes_of_the_plain_engine_on_a_gpu(sampling, kernels, engine, monkeypatch, caplog):
    if not kernels:
        monkeypatch.setattr(fixed, "KERNELS", {})
    gpt = tiny_gpt().cuda()
    for seed in range(8):
        expected = generate(gpt, [0, 3, 1], seed=seed, engine="eager", **sampling)
        assert torch.equal(generate(gpt, [0, 3, 1], seed=seed, engine=engine, **sampling), expected)
    assert not caplog.records  # nothing was given up


@pytest.mark.gpu
def test_the_loop_never_waits_for_the_gpu():
    gpt = tiny_gpt().cuda().bfloat16()
    draw = Draw(torch.rand(4, 9, 3).cuda(), 0.9, 5, 0.9)
    run = Run(torch.arange(4).cuda(), (1.5,) * 5 + (1.0,) * 4, draw)
    with torch.inference_mode():
        engine = engine_class("graph", "cuda")(gpt, run, Kept())
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for p in range(9):
                engine.position(p)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert engine.finite


@pytest.mark.gpu
def test_memory_does_not_grow_over_batches():
    gpt = tiny_gpt().cuda()
    used = []
    for seed in range(6):
        generate(gpt, [0, 1, 2, 3], seed=seed, cfg_scale=2.0)
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[2:] == [used[2]] * 4
