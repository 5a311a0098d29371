"""VQ-16 and VQ-8: what the published code computes, behind the interface that every tokenizer has."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from modelfolder import ModelFolderError
from tests.conftest import tiny_tokenizer
from tests.golden.fill import seeded_fill
from tests.tiny_vqgan import tiny_vqgan
from tokenizer import VQGAN, UniTok, VQGANConfig, load_tokenizer, read_tokenizer_config
from tokenizer.images import to_unit

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = {"rtol": 0, "atol": 3e-5}
NEAR_TIE = 2e-5


@pytest.fixture(scope="module")
def published():
    """(VQ-16 with the seeded weights, its goldens, the golden images in [-1, 1])."""
    layout = json.loads((GOLDEN / "llamagen_vq16_keys.json").read_text())
    state = {e["name"]: torch.from_numpy(np.asarray(seeded_fill(e["name"], e["shape"]))) for e in layout["entries"]}
    tokenizer = VQGAN.from_official(state)
    assert sum(p.numel() for p in tokenizer.parameters()) == layout["parameter_count"]
    with np.load(GOLDEN / "llamagen_vq16_seed0.npz") as arrays:
        golden = {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}
    with np.load(GOLDEN / "unitok_vitamin_base_seed0.npz") as arrays:  # the same two pictures
        return tokenizer, golden, to_unit(arrays["image_uint8"])


def test_the_published_sizes_are_the_defaults(published):
    assert published[0].config == VQGANConfig()


# The second picture adds ten seconds and nothing that the first does not show.
@pytest.fixture(scope="module", params=[0, pytest.param(1, marks=pytest.mark.slow)])
def one(request):
    """Rows of the golden pictures to look at."""
    return slice(request.param, request.param + 1)


@torch.no_grad()
def test_encoder_latents_and_codes_match(published, one):
    tokenizer, golden, images = published
    features = tokenizer.encoder(images[one])
    stride = int(golden["map_stride"])
    assert_close(features[:, :, ::stride, ::stride], golden["encoder_map"][one], **TOLERANCE)
    latents = tokenizer.quant_conv(features)
    assert_close(latents, golden["quant_conv"][one], **TOLERANCE)

    codes = tokenizer.quantize.to_codes(latents.flatten(2).transpose(1, 2))
    clear = golden["margin"][one] > NEAR_TIE
    assert torch.equal(codes[clear], golden["codes"][one].long()[clear])
    assert ((codes == golden["codes"][one]) | (codes == golden["codes_second"][one]))[~clear].all()


def check_decoded(published, name, codes, rows):
    tokenizer, golden, _ = published
    stride = int(golden["pixel_stride"])
    decoded = tokenizer.decode_unclamped(codes.long()[..., None])
    assert decoded.abs().max() > 1  # else this could not tell a clamp
    assert_close(decoded[:, :, ::stride, ::stride], golden[name][rows], **TOLERANCE)
    assert_close(decoded.double().mean((2, 3)).float(), golden[f"{name}_mean"][rows].float(), **TOLERANCE)
    assert_close(decoded.double().std((2, 3), correction=0).float(), golden[f"{name}_std"][rows].float(), **TOLERANCE)


def test_decoded_pixels_match_without_a_clamp(published, one):
    check_decoded(published, "decoded", published[1]["codes"][one], one)


@pytest.mark.slow
def test_random_codes_decode_to_the_golden_pixels(published):
    check_decoded(published, "random_decoded", published[1]["random_codes"], slice(None))


def test_decode_is_the_unclamped_image_clamped():
    tokenizer = tiny_vqgan()
    with torch.no_grad():
        tokenizer.decoder.conv_out.weight.mul_(20)
    codes = torch.randint(11, (2, 16, 1), generator=torch.Generator().manual_seed(0))
    unclamped = tokenizer.decode_unclamped(codes)
    assert unclamped.abs().max() > 1
    assert_close(tokenizer.decode(codes), unclamped.clamp(-1, 1))


@pytest.mark.parametrize(("levels", "patch"), [(5, 16), (4, 8)], ids=["VQ-16", "VQ-8"])
def test_encode_and_decode_have_the_common_shapes(levels, patch):
    tokenizer = tiny_vqgan(img_size=4 * patch, width_multiples=(1,) * levels)
    images = torch.rand(2, 3, 4 * patch, 4 * patch, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = tokenizer.encode(images)
    assert codes.shape == (2, 16, 1) and codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < 11
    decoded = tokenizer.decode(codes)
    assert decoded.shape == images.shape and decoded.dtype == torch.float32
    assert_close(decoded, tokenizer.reconstruct(images))


def test_a_published_tokenizer_works_at_other_sizes():
    small = tiny_vqgan(img_size=32, width_multiples=(1, 1))
    large = VQGAN.from_official(small.state_dict(), img_size=48)
    assert (large.config.grid, large.config.num_positions) == (24, 576)
    assert large.encode(torch.zeros(1, 3, 48, 48)).shape == (1, 576, 1)
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, large.state_dict()[name])


def test_sizes_are_read_off_the_tensors_whatever_wraps_the_names():
    tokenizer = tiny_vqgan(width_multiples=(1, 2, 2, 4), res_blocks=1, latent_width=48)
    state = {f"module._orig_mod.{name}": tensor for name, tensor in tokenizer.state_dict().items()}
    state["module._orig_mod.quantize.codebook_used"] = torch.zeros(65536)
    loaded = VQGAN.from_official(state, img_size=tokenizer.config.img_size)
    assert loaded.config == tokenizer.config
    codes = torch.arange(loaded.config.num_positions)[None, :, None] % 11
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))


def without(name):
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: {k: t for k, t in s.items() if k != "quantize.embedding.weight"}, "no VQ-16 or VQ-8"),
        (
            lambda s: {k: t for k, t in s.items() if k != "decoder.norm_out.bias"},
            r"1 missing \(decoder.norm_out.bias\)",
        ),
        (lambda s: {**s, "extra": torch.zeros(1)}, r"1 unexpected \(extra\)"),
        (lambda s: {}, "no VQ-16 or VQ-8"),
    ],
)
def test_other_tensors_are_refused_in_one_line(spoil, message):
    with pytest.raises(ValueError, match=message) as error:
        VQGAN.from_official(spoil(tiny_vqgan().state_dict()), img_size=64)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [{"img_size": 40}, {"width": 33}, {"width_multiples": ()}, {"codebook_size": 70000}, {"res_blocks": 0}],
    ids=str,
)
def test_impossible_sizes_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        VQGANConfig(**changes)


def test_wrong_inputs_are_refused():
    tokenizer = tiny_vqgan()
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 64, 64\)"):
        tokenizer.encode(torch.zeros(1, 3, 32, 64))
    with pytest.raises(ValueError, match=r"codes must be \(B, 16, 1\)"):
        tokenizer.decode(torch.zeros(1, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"codes must lie in \[0, 11\)"):
        tokenizer.decode(torch.full((1, 16, 1), 11))


@pytest.mark.parametrize("tokenizer", [tiny_vqgan(), tiny_tokenizer()], ids=["vqgan", "unitok"])
def test_a_folder_says_which_tokenizer_it_holds(tokenizer, tmp_path):
    folder = tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert json.loads((folder / "config.json").read_text())["kind"] == tokenizer.kind
    for path in (folder, tmp_path):  # a folder of its own, or a bundle
        loaded = load_tokenizer(path)
        assert type(loaded) is type(tokenizer) and loaded.config == tokenizer.config
        assert read_tokenizer_config(path) == tokenizer.config
    codes = (
        torch.arange(tokenizer.config.num_positions)[None, :, None].repeat(1, 1, tokenizer.config.num_codebooks) % 11
    )
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))


def test_a_folder_that_names_no_kind_is_unitok(tmp_path):
    folder = tiny_tokenizer().save_pretrained(tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    del config["kind"]
    (folder / "config.json").write_text(json.dumps(config))
    assert isinstance(load_tokenizer(folder), UniTok)


def test_another_kind_is_refused_by_name(tmp_path):
    folder = tiny_vqgan().save_pretrained(tmp_path / "vq")
    with pytest.raises(ModelFolderError, match="kind 'vqgan', not 'unitok'"):
        UniTok.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "kind": "fsq"}))
    with pytest.raises(ModelFolderError, match="kind 'fsq': known are unitok, vqgan"):
        load_tokenizer(folder)
