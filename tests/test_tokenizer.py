"""The tokenizer's parts: quantizer, projections, pixels, and reading what does not fit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from modelfolder import ModelFolderError
from tokenizer import PRESETS, UniTok, UniTokConfig
from tokenizer.images import load_rgb, psnr, to_pil, to_uint8, to_unit
from tokenizer.quantizers import QUANTIZERS

TINY = replace(
    PRESETS["vitamin_tiny"], img_size=32, stem_width=8, conv_widths=(8, 8), conv_depths=(1, 1), width=24, depth=1,
    heads=2, num_codebooks=3, code_width=4, codebook_size=16, embed_dim=10,
)  # fmt: skip


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    tokenizer = UniTok(TINY)
    tokenizer.init_weights()
    return tokenizer


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("projection", ["attn", "linear"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_quantizer_round_trips_shapes_and_reaches_every_parameter(quantizer, projection, images):
    config = replace(TINY, quantizer=quantizer, projection=projection)
    torch.manual_seed(0)
    tokenizer = UniTok(config)
    tokenizer.init_weights()
    result = tokenizer(images)
    assert result.images.shape == images.shape and result.codes.shape == (2, 4, 3)
    assert result.codes.dtype == torch.int64 and 0 <= result.codes.min() and result.codes.max() < 16
    (result.images.square().mean() + result.vq_loss + result.embedding.square().mean()).backward()
    assert not [n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    pixels = tokenizer.eval().reconstruct(images)
    assert pixels.shape == images.shape and pixels.abs().max() <= 1
    assert tokenizer.encode_image(images).shape == (2, 10)


def test_training_pass_and_encode_decode_agree(tiny, images):
    result = tiny.eval()(images)
    assert torch.equal(result.codes, tiny.encode(images))
    torch.testing.assert_close(result.images.clamp(-1, 1), tiny.decode(result.codes))
    torch.testing.assert_close(result.embedding, tiny.encode_image(images))


def test_codes_are_the_nearest_entries_by_cosine(tiny):
    latents = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(2))
    codes = tiny.quantizer.to_codes(latents)
    for k, book in enumerate(tiny.quantizer.codebooks):
        chunk = latents[..., 4 * k : 4 * k + 4]
        cosine = F.cosine_similarity(chunk[..., None, :], book.codebook.weight, dim=-1)
        assert torch.equal(codes[..., k], cosine.argmax(-1))
        looked_up = tiny.quantizer.lookup(codes)[..., 4 * k : 4 * k + 4]
        torch.testing.assert_close(looked_up, F.normalize(book.codebook.weight, dim=-1)[codes[..., k]])


def test_gradient_passes_straight_through_to_the_normalised_features(tiny):
    latents = torch.randn(1, 4, 12, requires_grad=True)
    weights = torch.randn(1, 4, 12)
    (tiny.quantizer(latents).features * weights).sum().backward()
    reference = latents.detach().clone().requires_grad_()
    (F.normalize(reference.unflatten(-1, (3, 4)), dim=-1).flatten(2) * weights).sum().backward()
    torch.testing.assert_close(latents.grad, reference.grad)


def test_usage_counts_and_unused_entries_restart_on_features(tiny):
    quantizer = tiny.quantizer.train()
    latents = torch.randn(8, 4, 12, generator=torch.Generator().manual_seed(0))[:1].expand(8, -1, -1)  # 4 vectors
    for _ in range(500):
        codes = quantizer(latents).codes
    chosen = torch.tensor([codes[..., k].unique().numel() for k in range(3)])
    torch.testing.assert_close(quantizer.usage() * 16, chosen.float())
    moved = quantizer.restart_unused(latents, torch.Generator().manual_seed(0))
    assert moved == (16 - chosen).sum()
    chunks = quantizer.unit_chunks(latents)
    for book, chunk in zip(quantizer.codebooks, chunks, strict=True):
        assert (book.unit_entries() @ chunk.T).max(dim=-1).values.min() > 0.2
        moved_rows = book.vocab_usage == 1 / 16
        assert ((book.unit_entries()[moved_rows] @ chunk.T).max(dim=-1).values > 1 - 1e-5).all()


def test_eval_mode_leaves_the_counters_alone(tiny, images):
    tiny.eval()(images)
    assert all(not book.vocab_usage.any() for book in tiny.quantizer.codebooks)


def test_autocast_keeps_the_quantizer_in_float32(tiny, images):
    with torch.autocast("cpu", torch.bfloat16):
        result = tiny(images)
    assert result.latents.dtype == result.vq_loss.dtype == result.images.dtype == torch.float32


def test_causal_projection_sees_no_later_position():
    config = replace(TINY, causal_projection=True)
    torch.manual_seed(0)
    tokenizer = UniTok(config)
    tokens = torch.randn(1, 4, 24)
    changed = tokens.clone()
    changed[:, 3] += 1
    difference = (tokenizer.quant_proj(tokens) - tokenizer.quant_proj(changed)).abs().amax(-1)[0]
    assert (difference[:3] == 0).all() and difference[3] > 0


def test_a_saved_tokenizer_comes_back(tiny, images, tmp_path):
    tiny.save_pretrained(tmp_path / "tokenizer")
    again = UniTok.from_pretrained(tmp_path / "tokenizer")
    assert again.config == TINY and not again.training
    assert torch.equal(again.encode(images), tiny.eval().encode(images))
    tiny.save_pretrained(tmp_path / "half", dtype=torch.float16)
    half = UniTok.from_pretrained(tmp_path / "half")
    assert next(half.parameters()).dtype == torch.float32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half", "tokenizer"]


def test_a_tokenizer_is_not_loaded_in_a_type_that_would_change_its_codes(tiny, tmp_path):
    folder = tiny.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="float32 only") as error:
        UniTok.from_pretrained(folder, dtype=torch.bfloat16)
    assert "\n" not in str(error.value)


def test_weights_of_another_architecture_are_named(tiny, tmp_path):
    folder = tiny.save_pretrained(tmp_path / "tokenizer")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"codebook_size": 16', '"codebook_size": 17'))
    with pytest.raises(ModelFolderError, match=r"6 wrong-shaped \(quantizer.codebooks.0.codebook.weight"):
        UniTok.from_pretrained(folder)
    (folder / "config.json").write_text(text.replace('"depth"', '"deepness"'))
    with pytest.raises(ModelFolderError, match=r"unknown keys \['deepness'\]"):
        UniTok.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_size": 100}, "multiple of 16"),
        ({"codebook_size": 70000}, "uint16"),
        ({"width": 26}, "multiple of"),
        ({"projection": "mlp"}, "attn or linear"),
        ({"num_codebooks": 0}, "at least 1"),
        ({"text": True, "embed_dim": 0}, "embed_dim"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_wrong_shapes_and_codes_are_refused(tiny):
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 32, 32\)"):
        tiny.encode(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"codes must be \(B, 4, 3\)"):
        tiny.decode(torch.zeros(1, 3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"codes must lie in \[0, 16\)"):
        tiny.decode(torch.full((1, 4, 3), 16))
    with pytest.raises(ValueError, match="no text tower"):
        tiny.encode_text(torch.zeros(1, 77, dtype=torch.int64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "vit"}, "vitamin_base or vitamin_large"),
        ({"num_query": 4}, "num_query = 4"),
        ({"vocab_size": 1001}, "must divide into 8 codebooks"),
    ],
)
def test_foreign_published_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        UniTok.from_official(arguments, {})
    with pytest.raises(ModelFolderError, match=r"tensors \d+ missing"):
        UniTok.from_official({"model": "vitamin_base"}, {})


def test_defaults_are_the_published_large_model():
    assert UniTokConfig() == PRESETS["vitamin_large"] and UniTokConfig().num_positions == 256


def test_pixels_go_in_and_out_with_the_published_rounding():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    unit = to_unit(levels)
    assert unit.shape == (1, 3, 16, 16) and unit.min() == -1 and unit.max() == 1
    assert np.abs(to_uint8(unit).astype(int) - levels).max() <= 1
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.999, 1.0, 2.0]).repeat(3, 1).reshape(1, 3, 1, 7)
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 64, 128, 255, 255, 255]
    assert to_pil(x)[0].size == (7, 1)
    with pytest.raises(ValueError, match="uint8"):
        to_unit(levels.astype(np.float32))


def test_transparent_pictures_are_composed_on_white(tmp_path):
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    picture.save(tmp_path / "p.png")
    assert np.asarray(load_rgb(tmp_path / "p.png")).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    (tmp_path / "no.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"no\.png cannot be read"):
        load_rgb(tmp_path / "no.png")


def test_psnr_of_a_known_error():
    images = torch.zeros(1, 3, 4, 4)
    assert psnr(images + 0.2, images).item() == pytest.approx(20.0, abs=1e-4)  # an error of a tenth of the range
