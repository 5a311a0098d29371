"""Options from later work: what each computes, that it is off by default, and that off changes nothing."""

import json

import pytest
import torch
import torch.nn.functional as F

from llamagen_unitok import GPT, GPTConfig, generate
from llamagen_unitok.cross_entropy import loss_terms
from llamagen_unitok.gpt import random_positions
from llamagen_unitok.training.generator import GeneratorObjective, GeneratorTraining, generator_loss
from tests.tiny_generator import GROUPED, SINGLE, TINY, random_batch, tiny_gpt


def test_terms_and_their_gradients_are_those_of_the_softmax():
    logits = torch.randn(2, 3, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    codes = torch.randint(7, (2, 3, 4), generator=torch.Generator().manual_seed(1))
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    terms = loss_terms(ours, codes)
    (terms.nll.mean() + 0.1 * terms.log_z.square().mean()).backward()
    log_z = theirs.logsumexp(-1)
    nll = F.cross_entropy(theirs.flatten(0, 2), codes.flatten(), reduction="none").view_as(codes)
    (nll.mean() + 0.1 * log_z.square().mean()).backward()
    torch.testing.assert_close(terms.nll, nll)
    torch.testing.assert_close(terms.log_z, log_z)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_loss_is_the_mean_over_codebooks_plus_the_z_loss():
    gpt = tiny_gpt()
    labels, codes = random_batch(gpt)
    log_probs = gpt(labels, codes).log_softmax(-1).gather(-1, codes[..., None])[..., 0]
    loss, logged = GeneratorObjective(gpt, 0.0)(labels, codes)
    torch.testing.assert_close(loss, -log_probs.mean())
    for k in range(3):
        torch.testing.assert_close(logged[f"loss_codebook_{k}"], -log_probs[..., k].mean())
    with_z, logged = GeneratorObjective(gpt, 0.0, z_loss=0.5)(labels, codes)
    squares = gpt(labels, codes).logsumexp(-1).square().mean()
    torch.testing.assert_close(with_z, loss + 0.5 * squares)
    torch.testing.assert_close(logged["z_loss"], squares)
    torch.testing.assert_close(logged["loss"], loss)


def test_weights_leave_pictures_out_of_the_means():
    gpt = tiny_gpt()
    labels, codes = random_batch(gpt, batch=3)
    objective = GeneratorObjective(gpt, 0.0)
    loss, _ = objective(labels, codes, weights=torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(loss, objective(labels[[0, 2]], codes[[0, 2]])[0])
    assert objective(labels, codes, weights=torch.zeros(3))[0].item() == 0


def head_gradient(gpt, batch, share: float, draws: torch.Tensor | None = None) -> torch.Tensor:
    gpt.zero_grad(set_to_none=True)
    gpt(*batch, return_loss=True, head_share=share, draws=draws).backward()
    parameters = [gpt.output.linear_head.weight, gpt.layers[0].attention.wqkv.weight]
    return torch.cat([p.grad.flatten() for p in parameters])


def test_a_share_of_the_positions_keeps_the_expected_gradient():
    # One picture, one of 4 positions at a time: each of them drawn equally often gives the whole gradient exactly.
    gpt = tiny_gpt(num_positions=4, token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0).train()
    batch = random_batch(gpt, batch=1)
    whole = head_gradient(gpt, batch, 1.0)
    draws = torch.rand(200, generator=torch.Generator().manual_seed(0))
    positions = random_positions(draws, 4, 0.25)[:, 0].tolist()
    by_position = {
        position: head_gradient(gpt, batch, 0.25, draws[i : i + 1])
        for position in range(4)
        for i in [positions.index(position)]
    }
    torch.testing.assert_close(sum(by_position.values()) / 4, whole, rtol=1e-4, atol=1e-6)


def test_every_set_of_positions_is_as_likely_as_any_other():
    draws = torch.rand(60_000, generator=torch.Generator().manual_seed(1))
    chosen = random_positions(draws, 4, 0.5).sort(1).values
    assert (chosen[:, 0] < chosen[:, 1]).all()  # never one twice
    counts = torch.bincount(chosen[:, 0] * 4 + chosen[:, 1], minlength=16)[[1, 2, 3, 6, 7, 11]]
    # 60,000 fair draws of 6 leave 10,000 ± 5 · 91 with odds above 0.9999
    assert counts.sum() == 60_000 and (counts - 10_000).abs().max() < 456
    # ... also among the draws that drop a label
    low = torch.bincount(random_positions(draws[draws < 0.1], 4, 0.25)[:, 0], minlength=4).double()
    assert (low / low.sum() - 0.25).abs().max() < 0.03  # five standard deviations of about 6,000 draws


def test_the_positions_of_a_picture_follow_from_its_draw_alone():
    draws = torch.rand(50, generator=torch.Generator().manual_seed(2))
    whole = random_positions(draws, 256, 0.25)
    assert whole.shape == (50, 64) and all(len(set(row.tolist())) == 64 for row in whole)
    assert torch.equal(whole, torch.cat([random_positions(draw[None], 256, 0.25) for draw in draws]))
    assert len({tuple(row.tolist()) for row in whole}) == 50


def test_a_share_of_the_positions_saves_its_part_of_the_head():
    gpt = tiny_gpt(num_positions=16).train()
    rows = []
    gpt.output.linear_head.register_forward_hook(lambda _m, inputs, _out: rows.append(inputs[0].shape[:-1].numel()))
    labels, codes = random_batch(gpt)
    for share in (1.0, 0.25):
        gpt(labels, codes, return_loss=True, head_share=share)
    assert rows == [3 * 16 * 3, 3 * 4 * 3]
    assert gpt(labels, codes, return_terms=True, head_share=0.01).nll.shape == (3, 1, 3)
    assert gpt(labels, codes, head_share=0.25).shape == (3, 16, 3, 11)  # logits are asked for: all of them
    assert gpt.eval()(labels, codes, return_terms=True, head_share=0.25).nll.shape == codes.shape


def test_options_are_off_by_default_and_leave_the_published_model_alone(tmp_path):
    settings = GeneratorTraining(codes=tmp_path)
    assert (settings.qk_norm, settings.z_loss, settings.head_share) == (False, 0.0, 1.0)
    config = GPTConfig(**TINY)
    assert not config.qk_norm and not any("q_norm" in name for name in GPT(config).state_dict())
    folder = tiny_gpt().save_pretrained(tmp_path / "old")
    written = json.loads((folder / "config.json").read_text())
    assert written.pop("qk_norm") is False
    (folder / "config.json").write_text(json.dumps(written))
    assert GPT.from_pretrained(folder).config == config


@pytest.mark.parametrize("changes", [{}, GROUPED, SINGLE], ids=["K=3", "grouped", "K=1"])
def test_qk_norm_is_the_same_with_every_engine(changes):
    gpt = tiny_gpt(qk_norm=True, **changes)
    labels, _ = random_batch(gpt)
    drawn = [generate(gpt, labels, seed=3, engine=engine) for engine in ("eager", "packed", "graph")]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    # Greedy codes are the best ones of the teacher-forced logits, which no cache has seen.
    codes = generate(gpt, labels, temperature=0.0)
    assert torch.equal(gpt(labels, codes).argmax(-1), codes)


def test_qk_norm_bounds_the_scores():
    gpt = tiny_gpt(qk_norm=True)
    attention = gpt.layers[0].attention
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    before = attention(x)
    with torch.no_grad():
        attention.wqkv.weight[:64] *= 100  # all queries and keys
    torch.testing.assert_close(attention(x), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"), [({"head_share": 0.0}, "--head-share"), ({"z_loss": -1.0}, "--z-loss must be 0 or above")]
)
def test_wrong_options_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        GeneratorTraining(codes=tmp_path, **changes)


def test_the_loss_of_nothing_weighs_nothing():
    gpt = tiny_gpt()
    labels, codes = random_batch(gpt)
    loss, _ = generator_loss(gpt(labels, codes, return_terms=True), weights=torch.zeros(3))
    assert loss.item() == 0
