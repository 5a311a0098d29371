"""The generator computes what the published code computes (tests/golden/README.md)."""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llamagen_unitok import GPT, generate
from llamagen_unitok.sampling import decode
from llamagen_unitok.sampling.guidance import guidance_scales
from tests.compiler import needs_compiler
from tests.golden.fill import fill_crc32, seeded_fill

GOLDEN = Path(__file__).parent / "golden"
SLOW = pytest.mark.slow


def on_every_engine(*cases):
    """Each case (name, scale, interval) on each engine. By default only what a CPU runs, and the last case on all;
    the compiled engine is the graph engine's step, and test_engines.py compares the two."""
    marks = {"native": [needs_compiler], "packed": [SLOW], "eager": [SLOW], "graph": [SLOW]}
    return [
        pytest.param(*case, engine, marks=[mark for mark in own if mark is not SLOW or case is not cases[-1]])
        for case in cases
        for engine, own in marks.items()
    ]


MODELS = {"unitok": ("unitok_gpt_b_seed0.npz", "unitok_gpt_b_cls01_keys.json")}
MODELS["llamagen"] = ("llamagen_gpt_b_seed0.npz", "llamagen_gpt_b_keys.json")
NULL_CLASS = 1000


def blk(field: np.ndarray, model: str) -> torch.Tensor:
    """Golden order (B, K, L, …), without K for one codebook → ours (B, L, K, …)."""
    tensor = torch.from_numpy(field)
    return tensor.unsqueeze(2) if model == "llamagen" else tensor.transpose(1, 2)


@cache
def load(model: str) -> SimpleNamespace:
    arrays, keys = MODELS[model]
    entries = json.loads((GOLDEN / keys).read_text())["entries"]
    state = {e["name"]: torch.from_numpy(seeded_fill(e["name"], e["shape"])) for e in entries}
    golden = np.load(GOLDEN / arrays)
    return SimpleNamespace(
        name=model,
        golden=golden,
        gpt=GPT.from_official(state),
        labels=torch.from_numpy(golden["labels"]).long(),
        codes=blk(golden["codes"], model).long(),
    )


@cache
def teacher_forced(model: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, L, K, V) for the labels, and for the null class."""
    case = load(model)
    with torch.inference_mode():
        labels = torch.cat((case.labels, torch.full_like(case.labels, NULL_CLASS)))
        return case.gpt(labels, case.codes.repeat(2, 1, 1)).chunk(2)


@pytest.fixture(params=MODELS)
def case(request):
    # One golden model in memory at a time would be enough, but both together are 1.1 GB and read once.
    return load(request.param)


def check_logits(case, prefix: str, logits: torch.Tensor, stride: int, positions, tolerance: float) -> None:
    """Compare logits (B, T, K, V) with the golden fields that start with `prefix`."""

    def field(name):
        return blk(case.golden[f"{prefix}_{name}"], case.name)

    torch.testing.assert_close(logits[:, positions, :, ::stride], field("logits"), atol=tolerance, rtol=0)
    torch.testing.assert_close(logits.logsumexp(-1), field("lse"), atol=tolerance, rtol=0)
    best, margin = logits.topk(2, dim=-1), field("margin")
    torch.testing.assert_close(best.values[..., 0] - best.values[..., 1], margin, atol=2 * tolerance, rtol=0)
    clear = margin > 1e-4
    assert torch.equal(best.indices[..., 0][clear], field("argmax").long()[clear])


def test_fill_gives_the_golden_arrays():
    entries = json.loads((GOLDEN / "seeded_fill_check.json").read_text())["entries"]
    assert len(entries) > 10
    for entry in entries:
        array = seeded_fill(entry["name"], entry["shape"], entry["seed"])
        assert fill_crc32(array) == entry["crc32"], entry["name"]
        assert array.ravel()[: len(entry["first"])].tolist() == entry["first"], entry["name"]


def test_rotation_table_matches(case):
    torch.testing.assert_close(
        case.gpt.rope.table, torch.from_numpy(case.golden["rope_table"]), atol=1e-6, rtol=0, equal_nan=False
    )


@pytest.mark.parametrize("prefix", ["tf", "tf_null"])
def test_teacher_forced_logits_match(case, prefix):
    logits = teacher_forced(case.name)[prefix == "tf_null"]
    stride, positions = int(case.golden["vocab_stride"]), case.golden["positions"]
    check_logits(case, prefix, logits, stride, positions, tolerance=3e-5)


@pytest.mark.parametrize("prefix", ["tf", "tf_null"])
def test_likelihoods_and_loss_match(case, prefix, monkeypatch):
    logits = teacher_forced(case.name)[prefix == "tf_null"]
    monkeypatch.setattr(GPT, "forward", lambda self, labels, codes: logits)
    nll = case.gpt.nll(case.labels, case.codes)
    torch.testing.assert_close(nll, blk(case.golden[f"{prefix}_nll"], case.name), atol=3e-5, rtol=0)
    assert nll.mean().item() == pytest.approx(float(case.golden[f"{prefix}_loss"]), abs=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_that_training_takes_is_the_published_one(case, training):
    gpt, before = case.gpt, case.gpt.training
    dropouts = {module: module.p for module in gpt.modules() if isinstance(module, torch.nn.Dropout)}
    try:
        for module in dropouts:
            module.p = 0.0  # as in the goldens
        with torch.no_grad():
            loss = gpt.train(training).loss(case.labels, case.codes).item()
    finally:
        gpt.train(before)
        for module, p in dropouts.items():
            module.p = p
    assert loss == pytest.approx(float(case.golden["tf_loss" if training else "eval_loss"]), abs=1e-5)


def test_trunk_states_match():
    case = load("unitok")
    with torch.inference_mode():
        prefix = case.gpt.cls_embedding(case.labels).unsqueeze(1)
        hidden = case.gpt.trunk(torch.cat((prefix, case.gpt.tok_embeddings(case.codes[:, :-1])), dim=1))
    expected = torch.from_numpy(case.golden["trunk_hidden"])
    torch.testing.assert_close(hidden[:, case.golden["positions"]], expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize(
    ("prefix", "scale", "interval", "engine"),
    on_every_engine(("dec_cfg1", 1.0, None), ("dec_cfg2", 2.0, None), ("dec_cfg2_interval5", 2.0, 5)),
)
def test_cached_decoding_logits_match(case, prefix, scale, interval, engine):
    positions, stride = int(case.golden["decode_steps"]), int(case.golden["decode_vocab_stride"])
    seen = []

    def forced(logits, position, codebook):
        seen.append(logits)
        return case.codes[:, int(position), codebook]

    decode(case.gpt, case.labels, forced, guidance_scales(256, scale, interval=interval)[:positions], engine=engine)
    logits = torch.stack(seen, dim=1).unflatten(1, (positions, -1))  # (B, T, K, V)
    check_logits(case, prefix, logits, stride, slice(None), tolerance=3e-5 if scale == 1 else 6e-5)


@pytest.mark.parametrize(
    ("field", "scale", "interval", "engine"),
    on_every_engine(("greedy_cfg1", 1.0, None), ("greedy_cfg2", 2.0, None), ("greedy_cfg2_interval3", 2.0, 3)),
)
def test_greedy_sequences_are_the_published_ones(case, field, scale, interval, engine):
    expected = blk(case.golden[field], case.name)
    scales = guidance_scales(256, scale, interval=interval)[: expected.shape[1]]
    codes = decode(case.gpt, case.labels, lambda logits, position, codebook: logits.argmax(-1), scales, engine=engine)
    assert torch.equal(codes, expected.long())


@pytest.mark.slow
def test_whole_greedy_pictures_start_with_the_published_codes(case):
    codes = generate(case.gpt, case.labels, temperature=0, cfg_scale=2.0)
    expected = blk(case.golden["greedy_cfg2"], case.name).long()
    assert torch.equal(codes[:, : expected.shape[1]], expected)
