"""Run with TRITON_INTERPRET=1, which Triton reads when it is first imported: its kernels on a CPU, step by step."""

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagen_unitok import generate
from llamagen_unitok.rope import rope_table, rotate
from llamagen_unitok.sampling import fixed
from llamagen_unitok.sampling.filters import choose, filter_logits
from llamagen_unitok.sampling.kernels import attend, guided_choice
from tests.tiny_generator import GROUPED, SINGLE, tiny_gpt

POSITION = torch.tensor([1])


def drawn(logits, uniforms, scales=(1.0, 1.0), codebook=1, **filters):
    """(codes (B,), whether all was finite)."""
    finite = torch.ones((), dtype=torch.bool)
    noise = torch.full((len(uniforms), 2, 3), 2.0)
    noise[:, 1, codebook] = uniforms
    settings_ = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **filters}
    codes = guided_choice(logits, noise, torch.tensor(scales), POSITION, finite, codebook, **settings_)
    return codes, finite.item()


@settings(max_examples=30, deadline=None)
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


@settings(max_examples=15, deadline=None)
@given(
    logits=st.lists(st.sampled_from([-3.0, -2.0, -0.0, 0.0, 0.5, 0.5000001, 3.0]), min_size=2, max_size=12),
    top_k=st.integers(0, 13),
    top_p=st.sampled_from([1.0, 0.95, 0.61803, 0.3, 1e-6]),
)
def what_is_kept_is_what_the_filters_keep(logits, top_k, top_p):
    rows = torch.tensor([logits])
    kept = filter_logits(rows, 1.0, top_k, top_p).softmax(-1)
    uniforms = (torch.arange(12) + 0.5) / 12
    codes, _ = drawn(rows.expand(12, -1).contiguous(), uniforms, top_k=top_k, top_p=top_p)
    sure = _sure_kept(rows, 1.0, top_k, top_p).item()
    assert not sure or set(codes.tolist()) <= set(kept[0].nonzero()[:, 0].tolist())
    counts = np.bincount(codes, minlength=len(logits)) / 12
    assert not sure or np.abs(counts - kept[0].numpy()).max() <= 1.01 / 12


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


def attention_is_that_of_plain_pytorch():
    generator = torch.Generator().manual_seed(0)
    table = rope_table(9, 12)
    # Position 70 is in the second block of keys; 12 channels do not fill a power of two.
    for position, kv_heads, turns in ((0, 2, table), (1, 2, None), (70, 2, table), (70, 1, None)):
        qkv = torch.randn(2, 2 + 2 * kv_heads, 12, generator=generator)
        whole = torch.randn(3, 2 * kv_heads, 81, 12, generator=generator)
        turned = qkv.clone()
        if turns is not None:
            turned[:, :-kv_heads] = rotate(qkv[:, None, :-kv_heads], turns[position, None])[:, 0]
        expected = whole.clone()
        expected[:2, :, position] = turned[:, 2:]
        keys, values = expected[:2, :, : position + 1].split(kv_heads, dim=1)
        answer = F.scaled_dot_product_attention(turned[:, :2, None], keys, values, enable_gqa=True).flatten(1)
        for new in (qkv, qkv[:, 2:]) if position == 0 else (qkv,):
            cache = whole.clone()
            y = attend(new, cache[:2], torch.tensor([position]), 2, turns)
            torch.testing.assert_close(y, answer, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(cache, expected, atol=1e-6, rtol=1e-6)


def engines_draw_the_codes_of_the_plain_one():
    fixed.KERNELS["cpu"] = fixed.KERNELS["cuda"]
    filters = {"temperature": 0.9, "top_k": 7, "top_p": 0.9}
    small = {"num_positions": 4, "layers": 1, "depth_layers": 1}
    for changes in ({}, {**GROUPED, "qk_norm": True}, {**SINGLE, **GROUPED}):
        gpt = tiny_gpt(**{**small, **changes})
        sampling = {"cfg_scale": 2.0, "cfg_interval": 0, **filters} if changes else {}
        expected = generate(gpt, [0, 3], engine="eager", **sampling)
        assert torch.equal(generate(gpt, [0, 3], engine="graph", **sampling), expected)
    assert "cpu" in fixed.KERNELS, "the kernels were given up"


if __name__ == "__main__":
    torch.set_num_threads(1)
    draws_are_those_of_the_filters()
    what_is_kept_is_what_the_filters_keep()
    guidance_is_mixed_in_and_what_is_not_finite_is_noticed()
    attention_is_that_of_plain_pytorch()
    engines_draw_the_codes_of_the_plain_one()
