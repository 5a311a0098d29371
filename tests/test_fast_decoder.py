"""The fast decoder gives the plain decoder's images."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import tiny_tokenizer
from tokenizer.fast import FastDecoder, PhaseUpsample2d
from tokenizer.vitamin import Upsample2d


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 7), st.integers(1, 6))
def test_phase_convolutions_are_the_upsampling_convolution(batch, width, out, height, columns):
    torch.manual_seed(batch + 10 * width + 100 * out)
    plain = Upsample2d(width, out)
    x = torch.randn(batch, width, height, columns)
    with torch.no_grad():
        torch.testing.assert_close(PhaseUpsample2d(plain)(x), plain(x), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def codes_of(tokenizer, batch=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(tokenizer.config.codebook_size, (batch, 9, 3), generator=generator)


def test_float32_images_are_equal_up_to_rounding(tokenizer):
    codes = codes_of(tokenizer)
    images = FastDecoder(tokenizer)(codes)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, tokenizer.decode_unclamped(codes), atol=1e-5, rtol=1e-5)


def test_bfloat16_images_differ_by_little_and_float32_ones_by_less(tokenizer):
    codes = codes_of(tokenizer)
    plain = tokenizer.decode(codes)
    off = (FastDecoder(tokenizer, torch.bfloat16)(codes).clamp(-1, 1) - plain).abs()
    assert 1e-6 < off.mean() < 1 / 127.5
    assert off.max() < 0.25


def test_every_upsampling_is_rewritten_and_the_tokenizer_is_left_alone(tokenizer):
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    fast = FastDecoder(tokenizer, torch.bfloat16)
    kinds = [type(module) for module in fast.decoder.modules()]
    assert Upsample2d not in kinds
    assert kinds.count(PhaseUpsample2d) == sum(isinstance(m, Upsample2d) for m in tokenizer.decoder.modules()) > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in tokenizer.state_dict().items())


def test_compiled_it_gives_the_same_images_and_one_compilation_serves_a_batch_size(tokenizer, monkeypatch):
    compiled, real = [], torch.compile

    def backend(graph, inputs):
        compiled.append(inputs[0].shape)
        return graph

    monkeypatch.setattr(torch, "compile", lambda module, dynamic: real(module, dynamic=dynamic, backend=backend))
    codes = codes_of(tokenizer)
    decoder = FastDecoder(tokenizer, torch.bfloat16, compiled=True)
    for _ in range(2):
        assert torch.equal(decoder(codes), FastDecoder(tokenizer, torch.bfloat16)(codes))
    assert decoder.compiled is not None and len(compiled) == 1


def test_a_compiler_that_fails_is_one_line_and_the_decoder_runs_uncompiled(tokenizer, monkeypatch, caplog):
    def broken(graph, inputs):
        raise RuntimeError("no C compiler")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: real(module, dynamic=dynamic, backend=broken))
    codes = codes_of(tokenizer)
    decoder = FastDecoder(tokenizer, compiled=True)
    for _ in range(2):
        assert torch.equal(decoder(codes), FastDecoder(tokenizer)(codes))
    lines = [record.getMessage() for record in caplog.records if record.name == "tokenizer.fast"]
    assert len(lines) == 1 and "runs uncompiled" in lines[0]


def test_wrong_codes_are_refused(tokenizer):
    with pytest.raises(ValueError, match="codes must lie in"):
        FastDecoder(tokenizer)(codes_of(tokenizer) + 11)
