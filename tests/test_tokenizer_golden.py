"""The tokenizer computes what the published UniTok computes: goldens of both published sizes, seeded weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.golden.fill import seeded_fill
from tokenizer import UniTok
from tokenizer.images import to_unit

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = {"rtol": 0, "atol": 3e-5}  # tests/golden/README.md; the reference itself moves by 8e-6
NEAR_TIE = 2e-5


@pytest.fixture(scope="module", params=["vitamin_base", "vitamin_large"])
def published(request):
    """(tokenizer with the seeded weights, its goldens)."""
    layout = json.loads((GOLDEN / f"unitok_{request.param}_keys.json").read_text())
    state = {e["name"]: torch.from_numpy(np.asarray(seeded_fill(e["name"], e["shape"]))) for e in layout["entries"]}
    tokenizer = UniTok.from_official(layout["config"], state, text=True)
    assert sum(p.numel() for p in tokenizer.parameters()) == layout["parameter_count"]
    with np.load(GOLDEN / f"unitok_{request.param}_seed0.npz") as arrays:
        return tokenizer, {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files if name != "texts"}


@pytest.fixture(scope="module")
def images(published):
    return to_unit(published[1]["image_uint8"])


@torch.no_grad()
def test_encoder_tokens_match_at_every_stage(published, images):
    tokenizer, golden = published
    encoder, kept = tokenizer.encoder, slice(None, None, int(golden["token_stride"]))
    stem = encoder.patch_embed(images)
    assert_close(stem[:, kept], golden["stem_tokens"], **TOLERANCE)
    assert_close(encoder.blocks[0](stem + encoder.pos_embed)[:, kept], golden["block0_tokens"], **TOLERANCE)
    assert_close(encoder(images)[:, kept], golden["encoder_tokens"], **TOLERANCE)


def test_codes_match_except_near_ties(published, images):
    tokenizer, golden = published
    assert_close(tokenizer.latents(images), golden["quant_proj"], **TOLERANCE)
    codes = tokenizer.encode(images).transpose(1, 2)
    clear = golden["margin"] > NEAR_TIE
    assert torch.equal(codes[clear], golden["codes"].long()[clear])
    assert ((codes == golden["codes"]) | (codes == golden["codes_second"]))[~clear].all()


def test_decoded_pixels_match(published):
    tokenizer, golden = published
    stride = int(golden["pixel_stride"])
    codes = golden["codes"].long().transpose(1, 2)
    with torch.no_grad():
        tokens = tokenizer.dequantize(codes)
        assert_close(tokens[:, :: int(golden["token_stride"])], golden["post_quant_tokens"], **TOLERANCE)
        unclamped = tokenizer.decoder(tokens)
    assert_close(unclamped[:, :, ::stride, ::stride], golden["decoded_unclamped"], **TOLERANCE)
    for name, pixels in (
        ("decoded_unclamped", unclamped),
        ("decoded", tokenizer.decode(codes)),
        ("random_decoded", tokenizer.decode(golden["random_codes"].long().transpose(1, 2))),
    ):
        assert_close(pixels[:, :, ::stride, ::stride], golden[name], **TOLERANCE)
        mean, std = pixels.double().mean((2, 3)), pixels.double().std((2, 3), correction=0)
        assert_close(mean.float(), golden[f"{name}_mean"].float(), **TOLERANCE)
        assert_close(std.float(), golden[f"{name}_std"].float(), **TOLERANCE)


def test_embeddings_match(published):
    tokenizer, golden = published
    codes = golden["codes"].long().transpose(1, 2)
    assert_close(tokenizer.embed_codes(codes), golden["image_features"], **TOLERANCE)
    assert_close(tokenizer.encode_text(golden["text_ids"].long()), golden["text_features"], **TOLERANCE)


def test_text_ids_match_the_clip_tokenizer(published):
    open_clip = pytest.importorskip("open_clip")
    with np.load(GOLDEN / "unitok_vitamin_base_seed0.npz") as arrays:
        texts = [str(text) for text in arrays["texts"]]
    assert torch.equal(open_clip.SimpleTokenizer()(texts).long(), published[1]["text_ids"].long())
