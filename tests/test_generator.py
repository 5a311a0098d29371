"""The generator's architecture, loss and folder on disk."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

from llamagen_unitok import GPT, GPTConfig
from llamagen_unitok.layers import RMSNorm
from llamagen_unitok.sampling import decode
from tests.tiny_generator import GROUPED, SINGLE, TINY, random_batch, tiny_gpt

VARIANTS = pytest.mark.parametrize("changes", [{}, SINGLE, GROUPED], ids=["K=3", "K=1", "grouped"])


def meta_parameters(config: GPTConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


@pytest.mark.parametrize(
    ("size", "published"),
    [
        ("B", "111M"),
        ("L", "343M"),
        ("XL", "775M"),
        ("XXL", "1.4B"),
        ("XXXL", "3.9B"),
        ("1B", "1.2B"),
        ("3B", "3.1B"),
        ("7B", "6.6B"),
    ],
)
def test_single_codebook_presets_have_the_published_sizes(size, published):
    config = GPTConfig.preset(size, num_codebooks=1, depth_layers=0, codebook_size=16384)
    millions = meta_parameters(config) / 1e6
    assert (f"{millions:.0f}M" if millions < 1000 else f"{millions / 1000:.1f}B") == published


@pytest.mark.parametrize(("size", "parameters"), [("B", 164_376_832), ("XXL", 1_574_568_448)])
def test_eight_codebook_presets_have_the_published_sizes(size, parameters):
    assert meta_parameters(GPTConfig.preset(size)) == parameters


def test_the_null_class_is_one_row_of_the_class_table():
    with_null, without = GPTConfig.preset("B"), GPTConfig.preset("B", has_null_class=False)
    assert meta_parameters(with_null) - meta_parameters(without) == with_null.width


@VARIANTS
def test_a_code_moves_no_earlier_logit_and_some_later_one(changes):
    gpt = tiny_gpt(**changes)
    labels, codes = random_batch(gpt)
    with torch.no_grad():
        before = gpt(labels, codes).flatten(1, 2)  # (B, L·K, V), in decoding order
        last = before.shape[1] - 1
        for place in range(before.shape[1]):
            changed = codes.flatten(1).clone()
            changed[:, place] = (changed[:, place] + 1) % gpt.config.codebook_size
            after = gpt(labels, changed.view_as(codes)).flatten(1, 2)
            assert torch.equal(after[:, : place + 1], before[:, : place + 1])
            assert place == last or not torch.allclose(after[:, place + 1], before[:, place + 1])


@VARIANTS
def test_cached_decoding_gives_the_teacher_forced_logits_at_every_position_and_codebook(changes):
    gpt = tiny_gpt(**changes)
    labels, codes = random_batch(gpt)
    expected = gpt(labels, codes)

    def forced(logits, position, codebook):
        torch.testing.assert_close(logits, expected[:, position, codebook], atol=2e-5, rtol=0)
        return codes[:, position, codebook]

    assert torch.equal(decode(gpt, labels, forced, [1.0] * gpt.config.num_positions), codes)


def test_grouped_heads_equal_full_heads_with_repeated_keys_and_values():
    grouped = tiny_gpt(**GROUPED)
    full = tiny_gpt()
    state = grouped.state_dict()
    heads, kv_heads, width = 4, 2, 8
    for name in [name for name in state if name.endswith("wqkv.weight")]:
        q, k, v = state[name].split((heads * width, kv_heads * width, kv_heads * width))
        repeated = [x.unflatten(0, (kv_heads, width)).repeat_interleave(2, dim=0).flatten(0, 1) for x in (k, v)]
        state[name] = torch.cat((q, *repeated))
    full.load_state_dict(state)
    labels, codes = random_batch(full)
    torch.testing.assert_close(grouped(labels, codes), full(labels, codes), atol=2e-5, rtol=0)


def test_teacher_forcing_is_the_same_in_train_and_eval_without_dropout():
    gpt = tiny_gpt(token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0)
    labels, codes = random_batch(gpt)
    expected = gpt(labels, codes)
    assert torch.equal(gpt.train()(labels, codes), expected)


@pytest.mark.parametrize("name", ["token_dropout", "residual_dropout", "ffn_dropout"])
def test_each_dropout_acts_in_train_only(name):
    off = {"token_dropout": 0.0, "residual_dropout": 0.0, "ffn_dropout": 0.0}
    gpt = tiny_gpt(**{**off, name: 0.5})
    labels, codes = random_batch(gpt)
    assert torch.equal(gpt(labels, codes), gpt(labels, codes))
    assert not torch.allclose(gpt.train()(labels, codes), gpt.eval()(labels, codes))


@VARIANTS
def test_loss_is_the_mean_of_the_negative_log_likelihoods(changes):
    gpt = tiny_gpt(**changes)
    labels, codes = random_batch(gpt)
    logits, nll = gpt(labels, codes), gpt.nll(labels, codes)
    assert logits.shape == (*codes.shape, gpt.config.codebook_size)
    expected = -logits.log_softmax(-1).gather(-1, codes[..., None])[..., 0]
    torch.testing.assert_close(nll, expected)
    torch.testing.assert_close(gpt.loss(labels, codes), expected.mean())
    torch.testing.assert_close(gpt(labels, codes, return_loss=True), expected.mean())


def test_loss_is_float32_in_a_bfloat16_model():
    gpt = tiny_gpt().bfloat16()
    loss = gpt.loss(*random_batch(gpt))
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_class_dropout_takes_the_null_class_in_train_only():
    gpt = tiny_gpt(token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0)
    labels, codes = random_batch(gpt)
    null_loss = gpt.loss(torch.full_like(labels, 5), codes)
    assert torch.equal(gpt.loss(labels, codes, class_dropout=1.0), gpt.loss(labels, codes))
    gpt.train()
    assert torch.equal(gpt.loss(labels, codes, class_dropout=1.0), null_loss)
    assert torch.equal(gpt.loss(labels, codes, class_dropout=0.0), gpt.eval().loss(labels, codes))


def test_class_dropout_follows_its_generator():
    gpt = tiny_gpt(token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0).train()
    labels, codes = random_batch(gpt, batch=16)
    losses = [
        gpt.loss(labels, codes, class_dropout=0.5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_class_dropout_without_a_null_class_is_refused():
    gpt = tiny_gpt(has_null_class=False)
    with pytest.raises(ValueError, match="null class"):
        gpt.loss(*random_batch(gpt), class_dropout=0.1)


def test_codes_of_another_shape_are_refused():
    gpt = tiny_gpt()
    labels, codes = random_batch(gpt)
    with pytest.raises(ValueError, match=r"\(3, 3, 9\).*\(3, 9, 3\)"):
        gpt(labels, codes.transpose(1, 2))


@VARIANTS
def test_every_parameter_gets_a_gradient(changes):
    gpt = tiny_gpt(**changes).train()
    labels, codes = random_batch(gpt)
    gpt.loss(labels, codes).backward()
    assert [name for name, p in gpt.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_fresh_model_predicts_the_uniform_distribution():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**TINY)).eval()
    assert gpt.loss(*random_batch(gpt)).item() == pytest.approx(math.log(11), abs=1e-6)


def test_init_follows_its_table():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**{**TINY, "width": 128, "codebook_size": 256}))
    zero = {"output.linear_head.weight", "output.linear_head.bias"}
    for name, parameter in gpt.named_parameters():
        if name in zero:
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            # The smallest matrix has 6 × 128 entries: its standard deviation is known to 2.6 %, 10 % is 3.9 sigma.
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name


def test_norm_is_computed_in_float32_and_returns_the_dtype_of_its_input():
    norm = RMSNorm(8, 1e-5).bfloat16()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = x.float()
    expected = (wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()).bfloat16()
    assert torch.equal(norm(x), expected)


def test_rope_table_is_not_stored_and_stays_float32():
    gpt = tiny_gpt()
    table = gpt.rope.table.clone()
    assert not [name for name in gpt.state_dict() if "rope" in name]
    assert torch.equal(gpt.bfloat16().rope.table, table)
    assert torch.equal(gpt.to_empty(device="cpu").rope.table, table)
    assert not table[0].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers"),
        ({"heads": 2.0}, "heads"),
        ({"width": 36}, "width 36"),
        ({"kv_heads": 3}, "kv_heads 3"),
        ({"num_positions": 10}, "square"),
        ({"num_codebooks": 1}, "depth_layers"),
        ({"depth_layers": 0}, "depth_layers"),
        ({"codebook_size": True}, "codebook_size"),
        ({"has_null_class": 1}, "has_null_class"),
        ({"token_dropout": 1.0}, "token_dropout"),
        ({"ffn_dropout": "0.1"}, "ffn_dropout"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"rope_base": math.nan}, "rope_base"),
    ],
)
def test_impossible_configs_are_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        GPTConfig(**{**TINY, **changes})
    assert "\n" not in str(error.value)


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'XXS'.*XXL"):
        GPTConfig.preset("XXS")


@VARIANTS
def test_a_folder_gives_back_the_same_model(changes, tmp_path):
    gpt = tiny_gpt(**changes)
    gpt.save_pretrained(tmp_path / "model")
    loaded = GPT.from_pretrained(tmp_path / "model")
    assert loaded.config == gpt.config
    assert not loaded.training
    labels, codes = random_batch(gpt)
    assert torch.equal(loaded(labels, codes), gpt(labels, codes))


def test_a_half_precision_folder_loads_as_float32(tmp_path):
    gpt = tiny_gpt()
    gpt.save_pretrained(tmp_path / "generator", dtype=torch.float16)
    loaded = GPT.from_pretrained(tmp_path)  # a bundle: the generator is its subfolder
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    labels, codes = random_batch(gpt)
    torch.testing.assert_close(loaded(labels, codes), gpt(labels, codes), atol=2e-2, rtol=0)


def test_truncated_weights_are_refused(tmp_path):
    folder = tiny_gpt().save_pretrained(tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"), [({"n_heads": 4}, "n_heads"), ({"width": 36}, "width"), ({"layers": 3}, r"layers\.2")]
)
def test_a_config_that_does_not_fit_is_refused(change, message, tmp_path):
    gpt = tiny_gpt()
    folder = gpt.save_pretrained(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({**dataclasses.asdict(gpt.config), **change}))
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(folder)


def test_autocast_loss_is_close_to_float32():
    gpt = tiny_gpt()
    labels, codes = random_batch(gpt)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = gpt.loss(labels, codes)
    expected = F.cross_entropy(gpt(labels, codes).flatten(0, 2), codes.flatten())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), abs=0.05)
