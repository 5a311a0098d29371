"""Run with TRITON_INTERPRET=1, which Triton reads when it is first imported: its kernels on a CPU, step by step."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagen_unitok import generate
from llamagen_unitok.sampling import fixed
from llamagen_unitok.sampling.filters import choose, filter_logits
from llamagen_unitok.sampling.kernels import guided_choice
from tests.tiny_generator import SINGLE, tiny_gpt

POSITION = torch.tensor([1])


def drawn(logits, uniforms, scales=(1.0, 1.0), codebook=1, **filters):
    """(codes (B,), whether all was finite)."""
    finite = torch.ones((), dtype=torch.bool)
    noise = torch.full((len(uniforms), 2, 3), 2.0)
    noise[:, 1, codebook] = uniforms
    settings_ = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **filters}
    codes = guided_choice(logits, noise, torch.tensor(scales), POSITION, finite, codebook, **settings_)
    return codes, finite.item()


@settings(max_examples=50, deadline=None)
@given(
    logits=st.lists(st.sampled_from([-30.0, -2.0, -0.0, 0.0, 0.5, 0.5000001, 3.0]), min_size=2, max_size=40),
    uniform=st.one_of(st.floats(0, 1, width=32, exclude_max=True), st.just(1 - 2**-24)),
    temperature=st.sampled_from([0.0, 1e-30, 0.3, 1.0, 1.7]),
    top_k=st.integers(0, 45),
    top_p=st.one_of(st.just(1.0), st.floats(1e-6, 1.0)),
)
def draws_are_those_of_the_filters(logits, uniform, temperature, top_k, top_p):
    rows = torch.tensor([logits, logits[::-1]])
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    uniforms = torch.full((2,), uniform)
    equal = drawn(rows, uniforms, **filters)[0] == choose(rows, uniforms, **filters)
    assert (equal | ~_sure_kept(rows, **filters) | ~_sure_draw(rows, uniform, **filters)).all()


def _sure_kept(rows, temperature, top_k, top_p):
    """Whether no sum of a row's largest probabilities is so near to top_p that the order of adding decides, (B,)."""
    probs = filter_logits(rows, temperature, top_k).double().softmax(-1)
    return ((probs.sort(-1, descending=True).values.cumsum(-1) - top_p).abs() > 1e-6).all(-1)


def _sure_draw(rows, uniform, temperature, top_k, top_p):
    if temperature == 0:
        return torch.ones(len(rows), dtype=torch.bool)
    probs = filter_logits(rows, temperature, top_k, top_p).double().softmax(-1)
    return ((probs.cumsum(-1) - uniform).abs() > 1e-6).all(-1) | (uniform > 1 - 1e-6)


@settings(max_examples=20, deadline=None)
@given(
    logits=st.lists(st.sampled_from([-3.0, -2.0, -0.0, 0.0, 0.5, 0.5000001, 3.0]), min_size=2, max_size=12),
    top_k=st.integers(0, 13),
    top_p=st.sampled_from([1.0, 0.95, 0.61803, 0.3, 1e-6]),
)
def what_is_kept_is_what_the_filters_keep(logits, top_k, top_p):
    rows = torch.tensor([logits])
    kept = filter_logits(rows, 1.0, top_k, top_p).softmax(-1)
    uniforms = (torch.arange(40) + 0.5) / 40
    codes, _ = drawn(rows.expand(40, -1).contiguous(), uniforms, top_k=top_k, top_p=top_p)
    sure = _sure_kept(rows, 1.0, top_k, top_p).item()
    assert not sure or set(codes.tolist()) <= set(kept[0].nonzero()[:, 0].tolist())
    counts = np.bincount(codes, minlength=len(logits)) / 40
    assert not sure or np.abs(counts - kept[0].numpy()).max() <= 1.01 / 40


def guidance_is_mixed_in_and_what_is_not_finite_is_noticed():
    logits = torch.randn(4, 11, generator=torch.Generator().manual_seed(0))
    uniforms = torch.tensor([0.2, 0.9])
    for scale in (1.0, 0.0, 2.5):
        mixed = logits[2:] + scale * (logits[:2] - logits[2:])
        codes, finite = drawn(logits, uniforms, (9.0, scale), codebook=0)
        assert finite and torch.equal(codes, choose(mixed, uniforms))
    logits[1, 3] = torch.inf
    assert drawn(logits, uniforms, codebook=1)[1]
    assert not drawn(logits, uniforms, codebook=0)[1]


def engines_draw_the_codes_of_the_plain_one():
    fixed.KERNELS["cpu"] = fixed.KERNELS["cuda"]
    for changes in ({}, SINGLE):
        gpt = tiny_gpt(**changes)
        for sampling in ({}, {"cfg_scale": 2.0, "cfg_interval": 3, "temperature": 0.9, "top_k": 7, "top_p": 0.9}):
            expected = generate(gpt, [0, 3, 1], engine="eager", **sampling)
            assert torch.equal(generate(gpt, [0, 3, 1], engine="graph", **sampling), expected)
    assert "cpu" in fixed.KERNELS, "the kernel was given up"


if __name__ == "__main__":
    torch.set_num_threads(1)
    draws_are_those_of_the_filters()
    what_is_kept_is_what_the_filters_keep()
    guidance_is_mixed_in_and_what_is_not_finite_is_noticed()
    engines_draw_the_codes_of_the_plain_one()
