"""The benchmarks run, and what they compare with computes what it should."""

import json

import pytest
import torch

from benchmarks import ceilings
from benchmarks import decode as decode_benchmark
from benchmarks import loader as loader_benchmark
from benchmarks import tokenizer as tokenizer_benchmark
from benchmarks import train as train_benchmark
from benchmarks.ceilings import Ceilings, floor_seconds
from benchmarks.decode import Settings
from benchmarks.plain_step import PlainStep
from benchmarks.published_loop import PublishedLoop, pick
from llamagen_unitok import GPTConfig
from llamagen_unitok.sampling import draws
from llamagen_unitok.sampling.filters import filter_logits
from tests.tiny_generator import GROUPED, random_batch, tiny_gpt


@pytest.mark.parametrize("changes", [{}, GROUPED], ids=["K=3", "grouped"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_published_loop_gives_the_generators_logits(changes, scale):
    gpt = tiny_gpt(**changes)
    labels, codes = random_batch(gpt)
    conditional, unconditional = gpt(labels, codes), gpt(torch.full_like(labels, 5), codes)
    with torch.inference_mode():
        loop = PublishedLoop(gpt, labels, scale=scale)
        logits = torch.stack([loop.step(p, force=codes[:, p]) for p in range(9)], dim=1)
    torch.testing.assert_close(logits, unconditional + scale * (conditional - unconditional), atol=5e-5, rtol=0)
    assert torch.equal(loop.codes, codes)


def test_the_published_pick_keeps_what_the_filters_keep():
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    drawn = pick(logits.expand(500, 20).clone(), 0.9, 12, 0.8)[:, 0].unique()
    assert torch.equal(drawn, filter_logits(logits, 0.9, 12, 0.8)[0].isfinite().nonzero()[:, 0])


def test_the_floor_is_that_of_the_published_tables():
    # XXL in bf16 on 4.3 TB/s and 790 TFLOP/s: 1,086 us a position at batch 1 and 3,790 at batch 256.
    config, positions = GPTConfig.preset("XXL"), list(range(256))
    for rows, microseconds in ((1, 1086), (256, 3790)):
        floor = floor_seconds(config, rows, positions, 2, Ceilings(4.3e12, 790e12))
        assert floor * 1e6 == pytest.approx(microseconds, rel=0.01)


def test_decoding_is_timed_against_the_published_loop(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(decode_benchmark, "measure", lambda device, dtype: Ceilings(1e10, 1e11))
    arguments = "--sizes nano --batches 1,2 --cfg 1,2 --engines eager,packed,graph --positions 1 --repeats 1 --baseline"
    plot = tmp_path / "plot.png"
    assert decode_benchmark.main([*arguments.split(), "--device", "cpu", "--plot", str(plot)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = report["rows"]
    assert [(r["batch"], r["cfg"], r["mode"]) for r in rows[:4]] == [
        (1, 1.0, mode) for mode in ("eager", "packed", "graph", "published")
    ]
    assert len(rows) == 16
    for row in rows:
        assert row["images_per_s"] == pytest.approx(row["batch"] / (256 * row["ms_per_position"] / 1e3), rel=1e-3)
        assert row["of_floor"] == pytest.approx(row["floor_ms"] / row["ms_per_position"], rel=1e-3)
        assert (row["mode"] == "published") == (row["speedup"] == 1)
    assert plot.read_bytes().startswith(b"\x89PNG")


QUICK = "--sizes nano --batches 1 --device cpu"


@pytest.mark.parametrize("engine", ["eager", "packed", "graph", pytest.param("compiled", marks=pytest.mark.slow)])
def test_any_number_of_rounds_over_spread_positions_can_be_timed(engine, capsys, monkeypatch):
    monkeypatch.setattr(decode_benchmark, "measure", lambda device, dtype: Ceilings(1e10, 1e11))
    arguments = f"{QUICK} --engines {engine} --positions 24 --repeats 3"
    assert decode_benchmark.main(arguments.split()) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["positions"] == 24 and row["ms_per_position"] > 0 and row["kernels"] > 20


def test_each_position_is_timed_where_it_is_in_the_sequence():
    gpt = decode_benchmark.random_generator("nano", torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        mode = decode_benchmark.engine_mode(Settings(), gpt, 1, 1.0, "graph")
        engine = mode.position.__self__
        for p in (5, 250, 40):
            decode_benchmark.timed(mode, p, torch.device("cpu"))
            assert engine.buffers.position.item() == p + 1
            assert engine.codes[0, p].any()


def test_modes_that_disagree_are_not_timed(monkeypatch):
    gpt = decode_benchmark.random_generator("nano", torch.device("cpu"), torch.float32)
    settings = Settings(baseline=True)
    decode_benchmark.check_agreement(gpt, ["eager", "packed", "graph"], settings)
    step = PublishedLoop.step
    with monkeypatch.context() as patch:
        patch.setattr(PublishedLoop, "step", lambda self, p, force=None: 1.01 * step(self, p, force))
        with pytest.raises(ValueError, match="published and eager disagree"):
            decode_benchmark.check_agreement(gpt, ["eager"], settings)
    # What is timed draws by itself: there too the engines must agree.
    monkeypatch.setattr(draws, "choose_on_cpu", lambda logits, *_: logits.argmin(-1))
    with pytest.raises(ValueError, match="graph and packed draw different codes"):
        decode_benchmark.check_agreement(gpt, ["packed", "graph"], Settings())


def test_a_mode_that_lacks_memory_is_a_row_without_figures_and_the_others_are_printed_as_they_come(capsys, monkeypatch):
    real = decode_benchmark.engine_mode

    def full(settings, gpt, batch, scale, name):
        if batch == 2 and name == "eager":
            raise torch.OutOfMemoryError
        return real(settings, gpt, batch, scale, name)

    monkeypatch.setattr(decode_benchmark, "measure", lambda device, dtype: Ceilings(1e10, 1e11))
    monkeypatch.setattr(decode_benchmark, "engine_mode", full)
    arguments = "--sizes nano --batches 1,2 --engines eager,packed --positions 1 --repeats 1 --device cpu"
    assert decode_benchmark.main(arguments.split()) == 0
    said = capsys.readouterr()
    rows = json.loads(said.out.splitlines()[-1])["rows"]
    assert [(row["batch"], row["mode"], "ms_per_position" in row) for row in rows] == [
        (1, "eager", True), (1, "packed", True), (2, "eager", False), (2, "packed", True)
    ]  # fmt: skip
    assert "nano batch 2 cfg 1, fp32 eager: out of memory" in said.err
    assert sum(line.startswith("| nano") for line in said.out.splitlines()) == 4


def test_bandwidth_is_that_of_the_fastest_way_to_read(monkeypatch):
    took = iter([4.0] * ceilings.REPEATS + [2.0, 8.0] * 1000)
    monkeypatch.setattr(ceilings, "seconds", lambda work, device: work() is None or next(took))
    assert ceilings._bandwidth(torch.device("cpu"), torch.float32, 1 << 20) == (1 << 20) / 2.0


def test_a_depth_head_that_a_cache_holds_is_read_again_at_the_speed_of_the_cache(monkeypatch):
    config, cpu, plain = GPTConfig.preset("B"), torch.device("cpu"), Ceilings(1e10, 1e15)
    head = ceilings.head_weights(config) * 4
    assert head == pytest.approx(126e6, rel=0.01)
    sizes = []
    monkeypatch.setattr(ceilings, "_bandwidth", lambda device, dtype, size: sizes.append(size) or 4e10)
    for cache, expected in ((None, None), (32 << 20, None), (260 << 20, 4e10)):
        monkeypatch.setattr(ceilings, "last_level_cache", lambda cache=cache: cache)
        assert ceilings.for_config(plain._replace(cached=1.0), config, cpu, torch.float32).cached == expected
    assert sizes == [head]
    saved = floor_seconds(config, 1, [0], 4, plain) - floor_seconds(config, 1, [0], 4, plain._replace(cached=4e10))
    assert saved == pytest.approx(7 * head * (1 / 1e10 - 1 / 4e10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "huge"], "--sizes huge"),
        (["--engines", "warp"], "--engines warp"),
        (["--batches", "x"], "--batches x"),
        (["--batches", "0"], "--batches"),
        (["--cfg", "nan"], "--cfg"),
        (["--threads", "-1"], "--threads"),
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--plot", "a.txt"], "--plot a.txt must end in .png"),
    ],
)
def test_wrong_flags_end_in_one_line(arguments, message, capsys):
    assert decode_benchmark.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_tokenizer_is_timed(bundle, capsys):
    assert tokenizer_benchmark.main(["--checkpoint", str(bundle), "--repeats", "1", "--device", "cpu"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["what"] for row in rows] == ["decode plain", "decode fast", "decode bf16", "encode"]
    assert rows[0]["mean_off"] == 0 < rows[1]["mean_off"] < 1e-5 < rows[2]["mean_off"]


def test_the_loader_is_timed(capsys):
    flags = ["--entries", "50", "--views", "2", "--batch-size", "8", "--steps", "2", "--workers", "0,1"]
    assert loader_benchmark.main([*flags, "--gpu-rate", "10"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["workers"] for row in rows] == [0, 1]
    for row in rows:
        assert row["samples_per_s"] > 0 and row["gpus_per_core"] == pytest.approx(row["per_core"] / 10, rel=1e-3)


@pytest.mark.parametrize("changes", [{}, GROUPED], ids=["K=3", "grouped"])
def test_the_plain_step_has_our_loss_and_gradients(changes):
    gpt = tiny_gpt(**changes)
    batch = random_batch(gpt)
    gradients = []
    for loss in (gpt(*batch, return_loss=True), PlainStep(gpt, torch.float32).loss(*batch)):
        gpt.zero_grad(set_to_none=True)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in gpt.parameters())])
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=2e-5)


def test_training_is_timed_against_the_plain_step(capsys, monkeypatch):
    monkeypatch.setattr(train_benchmark, "measure", lambda device, dtype: Ceilings(1e10, 1e11))
    arguments = "--sizes nano --batches 1 --repeats 1 --plain --peak-tflops 2 --device cpu"
    assert train_benchmark.main(arguments.split()) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(r["batch"], r["mode"]) for r in rows] == [(1, "ours"), (1, "plain")]
    ours, plain = rows
    assert ours["speedup"] == pytest.approx(plain["ms_per_step"] / ours["ms_per_step"], rel=1e-3)
    assert plain["speedup"] == 1 and "head_share" not in plain and 0 < ours["head_share"]
    for row in rows:
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["ms_per_step"] * 1e3, rel=1e-3)
        assert row["tokens_per_s"] == pytest.approx(row["images_per_s"] * 256 * 8, rel=1e-3)
        assert row["mfu"] == pytest.approx(row["tflops"] / 2, rel=1e-3)


def test_the_step_that_is_timed_is_the_one_that_trains(monkeypatch):
    calls = []

    def noted(name):
        real = getattr(train_benchmark, name)

        def call(*args, **options):
            calls.append((name, *[a for a in args if isinstance(a, (int, str))], *options.values()))
            return real(*args, **options)

        monkeypatch.setattr(train_benchmark, name, call)

    for name in ("forward_backward", "wrap_blocks", "clip_gradients", "set_float32_products"):
        noted(name)
    monkeypatch.setattr(train_benchmark, "measure", lambda device, dtype: Ceilings(1e10, 1e11))
    flags = "--batches 2 --repeats 1 --accumulate 2 --checkpoint-activations full --device cpu"
    assert train_benchmark.main(flags.split()) == 0
    assert ("wrap_blocks", "full", False) in calls and ("set_float32_products", "fp32") in calls
    assert calls.count(("forward_backward", 2)) == 2 and calls.count(("clip_gradients",)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--precision fp16", "--precision must be one of bf16, tf32, fp32"),
        ("--batches 3 --accumulate 2", "--accumulate 2 does not divide all of --batches 3"),
        ("--compile maybe", "--compile must be one of auto, on, off"),
    ],
)
def test_wrong_flags_of_the_training_benchmark_end_in_one_line(arguments, message, capsys):
    assert train_benchmark.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_a_mode_that_does_not_fit_is_a_row_without_figures(capsys, monkeypatch):
    def full(*_args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train_benchmark, "measure", lambda device, dtype: Ceilings(1e10, 1e11))
    monkeypatch.setitem(train_benchmark.MODES, "plain", full)
    monkeypatch.setitem(train_benchmark.MODES, "ours", lambda *_args: lambda labels, codes: None)
    assert train_benchmark.main("--sizes nano --batches 1 --repeats 1 --device cpu --plain".split()) == 0
    said = capsys.readouterr()
    ours, plain = json.loads(said.out.splitlines()[-1])["rows"]
    assert plain["mode"] == "plain" and "ms_per_step" not in plain and ours["ms_per_step"] > 0
    assert "batch 1, plain: out of memory" in said.err


def test_a_plain_step_that_disagrees_is_not_timed(monkeypatch):
    gpt = train_benchmark.random_generator("nano", torch.device("cpu"), torch.float32)
    train_benchmark.check_agreement(gpt, torch.float32)
    loss = PlainStep.loss
    monkeypatch.setattr(PlainStep, "loss", lambda *args: 1.01 * loss(*args))
    with pytest.raises(ValueError, match="disagree on the loss"):
        train_benchmark.check_agreement(gpt, torch.float32)
