"""What a run writes about itself: figures, validation losses, previews, its settings; and the dry run."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_gpt
from llamagen_unitok import pipeline
from llamagen_unitok.runtime.distributed import World
from llamagen_unitok.runtime.log import TrainingLog
from llamagen_unitok.training.data import CodeShards, StepSampler
from llamagen_unitok.training.flops import flops_per_image
from llamagen_unitok.training.generator import GeneratorObjective
from llamagen_unitok.training.validation import Part, Validation, split
from tests.random_codes import random_codes
from tests.tiny_generator import tiny_gpt

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--layers 1 --heads 2 --width 32 --depth-layers 1 --ffn-multiple 16 --batch-size 4 --warmup-steps 0 --workers 0"
CPU = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return random_codes(tmp_path_factory.mktemp("codes") / "codes", pictures=40, views=("top left", "centre"))


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_its_figures_validation_previews_and_settings(codes, bundle, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = (
        f"--steps 6 --log-every 2 --held-out 0.25 --validate-every 3 --preview-every 4 --peak-tflops 0.5 {SMALL}"
    )
    command = [*arguments.split(), "--codes", str(codes), "--out", str(out), "--preview", str(bundle)]
    assert train_gpt.main([*command, "--recipe", "unitok-cfgfree", "--model", "B"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(out / "generator")
    assert "batch_size 4 instead of 1024" in " ".join(said.err.split())

    logged = {line["step"]: line for line in lines(out) if "grad_norm" in line}
    validated = {line["step"]: line for line in lines(out) if "validation_loss" in line}
    assert list(logged) == [2, 4, 6] and list(validated) == [3, 6]
    flops = flops_per_image(tiny_config(out)).total
    for line in logged.values():
        assert line["loss"] == pytest.approx(sum(line[f"loss_codebook_{k}"] for k in range(3)) / 3, rel=1e-5)
        assert line["tflops"] == pytest.approx(line["images_per_sec"] * flops / 1e12, rel=1e-5)
        assert line["mfu"] == pytest.approx(line["tflops"] / 0.5, rel=1e-5)
        assert line["memory_gb"] > 0.01 and line["lr"] > 0
    assert "validation_loss_codebook_2" in validated[3]
    assert [p.name for p in sorted((out / "previews").iterdir())] == ["step-00000004.png"]
    assert list((out / "tensorboard").iterdir())

    config = json.loads((out / "config.json").read_text())
    assert config["recipe"] == "unitok-cfgfree" and config["differs"]["batch_size"] == [1024, 4]
    assert config["loop"]["lr"] == 3e-4 and config["training"]["held_out"] == 0.25
    assert config["model"]["layers"] == 1 and config["model"]["has_null_class"] is False


def tiny_config(out: Path):
    from llamagen_unitok import GPT

    return GPT.read_config(out / "generator")


def test_validating_changes_nothing_that_is_trained(codes, tmp_path):
    losses = []
    for name, extra in (("a", "--validate-every 1"), ("b", "--validate-every 2")):
        command = f"--steps 2 --log-every 1 --held-out 0.25 {extra} {SMALL}".split()
        assert train_gpt.main([*command, "--codes", str(codes), "--out", str(tmp_path / name)]) == 0
        losses.append([line["loss"] for line in lines(tmp_path / name) if "loss" in line])
    assert losses[0] == losses[1] and len(losses[0]) == 2


@pytest.mark.parametrize(("pictures", "share"), [(10, 0.3), (1000, 0.01), (5, 0.01), (7, 0.0)])
def test_the_split_is_seeded_and_complete(pictures, share):
    trained, held = split(pictures, share, seed=1)
    assert sorted([*trained, *held]) == list(range(pictures))
    assert len(held) == (max(1, round(share * pictures)) if share else 0)
    assert all((a == b).all() for a, b in zip(split(pictures, share, seed=1), (trained, held), strict=True))
    if pictures == 1000:
        assert list(held) != list(split(pictures, share, seed=2)[1])


def test_a_split_leaves_something_to_train_on():
    with pytest.raises(ValueError, match="leaves none to train on"):
        split(2, 0.9, seed=0)


def test_held_out_pictures_are_never_trained_on():
    class Seen:
        def __init__(self):
            self.indices = set()

        def __getitem__(self, item):
            self.indices.add(item[0])

    trained, held = split(20, 0.3, seed=0)
    seen = Seen()
    part = Part(seen, trained)
    for batch in StepSampler(len(part), 4, 0, 9, seed=0, world=CPU):
        for item in batch:
            part[item]
    assert seen.indices == set(trained.tolist()) and not seen.indices & set(held.tolist())


@pytest.mark.parametrize("count", [5, 16, 23])
def test_validation_is_the_mean_over_the_middle_views_without_dropout(codes, count):
    shards, gpt = CodeShards(codes), tiny_gpt(token_dropout=0.5)
    objective = GeneratorObjective(gpt, 0.5, head_share=0.25).train()
    losses = Validation(objective, shards, range(3, 3 + count), every=1, bf16=False, world=CPU).losses()
    assert objective.training and gpt.training
    rows = [shards[i, 1] for i in range(3, 3 + count)]
    labels, codes_BLK = torch.tensor([r[0] for r in rows]), torch.stack([torch.from_numpy(r[1]) for r in rows])
    with torch.no_grad():
        expected = gpt.eval().nll(labels, codes_BLK)
    assert losses["validation_loss"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert losses["validation_loss_codebook_1"] == pytest.approx(expected[..., 1].mean().item(), rel=1e-5)


def test_processes_share_the_held_out_pictures(codes):
    class Half(World):
        def mean(self, value):
            totals.append(value.clone())
            return value

    shards, objective = CodeShards(codes), GeneratorObjective(tiny_gpt(), 0.0)
    whole = Validation(objective, shards, range(37), every=1, bf16=False, world=CPU).losses()
    totals: list[torch.Tensor] = []
    for rank in range(2):
        Validation(objective, shards, range(37), every=1, bf16=False, world=Half(rank, 2, CPU.device)).losses()
    *sums, weight = sum(totals).tolist()
    assert weight == 37
    assert [s / weight for s in sums] == pytest.approx(list(whole.values()), rel=1e-5)


@pytest.mark.slow
def test_two_processes_validate_and_preview(codes, bundle, tmp_path):
    arguments = f"--steps 4 --log-every 2 --held-out 0.25 --validate-every 2 --preview-every 2 --dropout 0 {SMALL}"
    arguments += f" --class-dropout 0 --precision fp32 --device cpu --preview {bundle} --codes {codes}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "train_gpt.py"), *arguments.split(), "--out", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True, timeout=240)
    assert train_gpt.main([*arguments.split(), "--out", str(tmp_path / "one")]) == 0
    one, two = ([line for line in lines(tmp_path / n) if "validation_loss" in line] for n in ("one", "two"))
    assert len(one) == 2
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert len(list((tmp_path / "two" / "previews").iterdir())) == 2


def test_small_numbers_are_not_rounded_away(tmp_path):
    log = TrainingLog(tmp_path, 0, 10, 4)
    log.record(1, {"lr": 3.25e-9})
    log.close()
    assert lines(tmp_path) == [{"step": 1, "lr": 3.25e-9}]


def test_figures_that_a_full_disk_does_not_take_are_told_once_and_the_run_goes_on(tmp_path, capsys):
    log = TrainingLog(tmp_path, 0, 10, 4)
    log.record(1, {"loss": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 5, hard))
        for step in (2, 3):
            log.record(step, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    log.record(4, {"loss": 1.0})
    log.close()
    told = [line for line in capsys.readouterr().err.splitlines() if "cannot be written" in line]
    assert len(told) == 1 and str(tmp_path) in told[0]
    assert [line["step"] for line in lines(tmp_path)] == [1, 4]  # and nothing torn between them


def test_curves_that_cannot_be_written_do_not_end_the_run(tmp_path, capsys):
    class Broken:
        def add_scalar(self, *_values):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = TrainingLog(tmp_path, 0, 10, 4)
    log.board.close()
    log.board = Broken()
    log.record(1, {"loss": 1.0})
    log.record(2, {"loss": 1.0})
    log.close()
    assert capsys.readouterr().err.count("cannot be written") == 1
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize("every", [0, 2])
@pytest.mark.parametrize("error", [RuntimeError("no\nkernel"), torch.OutOfMemoryError("full"), OSError("disk")])
def test_a_preview_that_fails_is_told_and_the_run_goes_on(codes, bundle, tmp_path, monkeypatch, capsys, every, error):
    def fail(*_arguments):
        raise error

    monkeypatch.setattr(pipeline, "make_preview", lambda *_args, **_options: fail)
    command = f"--steps 4 --save-every 2 --preview-every {every} {SMALL} --preview {bundle} --codes {codes}".split()
    assert train_gpt.main([*command, "--out", str(tmp_path / "run")]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("no preview of step ")]
    assert told == [f"no preview of step {step}: {' '.join(str(error).split())}" for step in (2, 4)]
    assert (tmp_path / "run" / "generator" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--held-out", "0.1"], "--held-out and --validate-every belong together"),
        (["--validate-every", "5"], "--held-out and --validate-every belong together"),
        (["--preview-every", "5"], "--preview-every needs --preview"),
        (["--peak-tflops", "0"], "--peak-tflops must be above 0"),
        (["--recipe", "mine"], "--recipe mine is not known"),
        (["--epochs", "1", "--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["--held-out", "-1", "--validate-every", "1"], "--held-out must lie in [0, 1), not -1"),
        (["--epochs", "1", "--steps", "9"], "--steps and --epochs say the same"),
        (["--dry-run", "--gpus", "3"], "--batch-size 256 does not divide into --gpus 3"),
        (["--dry-run", "--gpus", "4", "--accumulate", "3"], "does not divide into --gpus 4 and --accumulate 3"),
        (
            ["--dry-run", "--gpus", "4", "--parallel", "hsdp", "--shard-size", "3"],
            "--shard-size 3 does not divide --gpus 4",
        ),
        (["--dry-run", "--gpu-memory", "0"], "--gpu-memory must be above 0"),
        (["--dry-run", "--mfu", "1.5"], "--mfu must lie in (0, 1]"),
    ],
)
def test_wrong_flags_are_one_clear_line(codes, tmp_path, capsys, flags, message):
    assert train_gpt.main(["--codes", str(codes), "--out", str(tmp_path / "run"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["--codes", "--out"])
def test_a_run_needs_codes_and_a_place(codes, tmp_path, capsys, missing):
    given = {"--codes": str(codes), "--out": str(tmp_path / "run")}
    del given[missing]
    assert train_gpt.main([word for pair in given.items() for word in pair]) == 2
    assert f"{missing} is missing" in capsys.readouterr().err


def test_a_dry_run_prints_the_published_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train_gpt.main("--recipe unitok-cfgfree --dry-run --gpus 16 --mfu 0.5 --peak-tflops 989".split()) == 0
    said = capsys.readouterr().out
    for words in (
        "followed in every setting",
        "1.575 B = trunk 1.359 B + head 163.6 M",
        "3.586 T = trunk 2.087 + attention 0.030 + head 1.469 (head: 41%)",
        "375,342 steps of 1024 = 384,350,208 images, 300 epochs of 1,281,167 pictures",
        "weights 6.3 + gradients 6.3 + optimizer 12.6",
        "2206 images/s on 16 GPUs, 138 each, at 50% of 989 TFLOP/s",
        "2 d 0 h, 774 GPU-hours",
    ):
        assert words in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "weights 6.3 + gradients 6.3 + optimizer 12.6 + activations 122"),
        ("", "64 images at once; --parallel ddp, a copy of the model on each GPU"),
        ("", "!            more than the 85 GB of --gpu-memory"),
        ("--accumulate 4", "16 images at once"),
        ("--parallel fsdp", "weights 0.4 + gradients 0.4 + optimizer 0.8"),
        ("--parallel hsdp --shard-size 4", "weights 1.6 + gradients 1.6 + optimizer 3.1"),
        ("--parallel hsdp", "a copy on every 8 GPUs"),
        ("--gpu-memory 60", "--parallel fsdp, one copy on 16 GPUs"),
        ("--checkpoint-activations full", "recomputed activations: full"),
    ],
)
def test_a_dry_run_counts_parts_shards_and_recomputation(capsys, flags, said):
    assert train_gpt.main(f"--recipe unitok-cfgfree --dry-run --gpus 16 {flags}".split()) == 0
    assert said in capsys.readouterr().out


def test_the_dry_run_in_the_docs_is_what_it_prints(capsys):
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    command, printed = re.search(
        r"`python train_gpt\.py (.* --dry-run[^`]*)` prints.*?```\n(.*?)```", page, re.S
    ).groups()
    assert train_gpt.main(command.split()) == 0
    assert capsys.readouterr().out == printed


def test_a_dry_run_counts_the_codes_it_is_given(codes, tmp_path, capsys):
    arguments = [*f"--dry-run --gpus 2 --epochs 3 --held-out 0.1 --validate-every 1 {SMALL}".split(), "--codes"]
    assert train_gpt.main([*arguments, str(codes), "--out", str(tmp_path / "run")]) == 0
    assert "27 steps of 4 = 108 images, 3 epochs of 36 pictures" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
