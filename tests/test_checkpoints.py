"""Checkpoints: complete or not there, whatever happens to process or disk; export; starting from other weights."""

import dataclasses
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_gpt
from llamagen_unitok import GPT, GPTConfig
from llamagen_unitok.labels import ClassNames
from llamagen_unitok.pipeline import ImageGenerator
from llamagen_unitok.runtime.checkpoint import Checkpoints, complete_checkpoints, find_checkpoint, read_tensors
from llamagen_unitok.runtime.distributed import World
from llamagen_unitok.training.export import export, load_trained
from llamagen_unitok.training.finetune import start_from
from tests.random_codes import write_codes
from tests.tiny_generator import TINY, tiny_gpt

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
ALONE = World(0, 1, torch.device("cpu"))
FLAGS = {
    "layers": 1, "heads": 2, "width": 32, "depth-layers": 1, "ffn-multiple": 16, "batch-size": 4, "warmup-steps": 1,
    "workers": 0, "steps": 4, "save-every": 2, "log-every": 1, "precision": "fp32", "keep": 9,
}  # fmt: skip


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return write_codes(tmp_path_factory.mktemp("codes") / "codes")


def arguments(codes: Path, out: Path, **changes) -> list[str]:
    flags = {**FLAGS, **{name.replace("_", "-"): value for name, value in changes.items()}}
    words = ["--codes", codes, "--out", out, *(word for name, value in flags.items() for word in (f"--{name}", value))]
    return [str(word) for word in words]


def names_of(out: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(out)]


@pytest.mark.parametrize("background", [True, False])
def test_a_checkpoint_holds_what_was_there_when_it_was_saved(tmp_path, background):
    checkpoints = Checkpoints(tmp_path, {"a": 1}, ALONE, keep=2, keep_every=4, background=background)
    weight = torch.zeros(1000)
    for step in range(1, 8):
        weight.fill_(step)
        checkpoints.save(step, {"model": {"w": weight}, "step": step})
        weight.fill_(-1)  # as the next optimizer step does
        latest = tmp_path / "checkpoints" / "latest"
        assert not latest.is_symlink() or (latest / "meta.json").exists()
    checkpoints.settle()
    checkpoints.close()
    assert names_of(tmp_path) == ["step-00000004", "step-00000006", "step-00000007"]
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "step-00000007"
    for path in complete_checkpoints(tmp_path):
        step = int(path.name[-1])
        assert torch.equal(read_tensors(path, "model")["w"], torch.full((1000,), float(step)))
        assert json.loads((path / "meta.json").read_text()) == {"a": 1, "step": step}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {*names_of(tmp_path), "latest"}


@pytest.fixture
def small_disk():
    """limit(bytes): files of this process cannot grow beyond it; undone at the end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write() fails, as on a full disk
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, ignored)


def test_a_save_that_fails_leaves_the_one_before_and_says_so(tmp_path, small_disk, capsys):
    checkpoints = Checkpoints(tmp_path, {}, ALONE, keep=1)
    state = {"model": {"w": torch.ones(100_000)}}
    checkpoints.save(1, state)
    checkpoints.settle()
    small_disk(50_000)
    checkpoints.save(2, state)
    checkpoints.settle()
    small_disk(resource.RLIM_INFINITY)
    error = capsys.readouterr().err
    assert error.startswith("the checkpoint of step 2 could not be written (") and error.count("\n") == 1
    assert "the newest complete one: step 1" in error and checkpoints.failure
    assert names_of(tmp_path) == ["step-00000001"]
    assert torch.equal(read_tensors(find_checkpoint(tmp_path, "auto"), "model")["w"], torch.ones(100_000))
    checkpoints.save(3, state)
    checkpoints.settle()
    checkpoints.close()
    assert checkpoints.failure is None and names_of(tmp_path) == ["step-00000003"]


def test_a_run_outlives_a_full_disk_and_is_continued(codes, tmp_path, small_disk, capsys):
    assert train_gpt.main(arguments(codes, tmp_path / "whole")) == 0
    out = tmp_path / "run"
    capsys.readouterr()
    small_disk(40_000)  # metrics fit, weights do not
    assert train_gpt.main(arguments(codes, out)) == 2
    small_disk(resource.RLIM_INFINITY)
    lines = [line for line in capsys.readouterr().err.splitlines() if "could not be written" in line]
    assert any("the checkpoint of step 2 could not be written" in line for line in lines)
    assert any("step 4 could not be written" in line for line in lines[-1:]) and not names_of(out)
    assert train_gpt.main(arguments(codes, out)) == 0
    whole, again = (load_file(tmp_path / name / "generator" / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(("weights", "named"), [("ema", True), ("raw", True), ("ema", False), ("raw", False)])
def test_export_gives_the_weights_that_training_has(codes, tmp_path, weights, named):
    out = tmp_path / "run"
    changes = {"ema": 0.9} if weights == "ema" else {}
    assert train_gpt.main(arguments(codes, out, **changes)) == 0
    words = ["--export", str(tmp_path / "exported"), *(["--export-weights", weights] if named else [])]
    assert train_gpt.main([*arguments(codes, out, **changes), *words]) == 0
    passed_on = load_file(out / "generator" / "model.safetensors")
    exported = GPT.from_pretrained(tmp_path / "exported")
    assert {name: True for name in passed_on} == {
        name: torch.equal(passed_on[name], tensor) for name, tensor in exported.state_dict().items()
    }
    if weights == "ema":
        raw = load_trained(out, "raw").state_dict()
        assert not torch.equal(raw["norm.weight"], passed_on["norm.weight"])
        newest = complete_checkpoints(out)[-1]
        assert export(newest, tmp_path / "named") == tmp_path / "named"  # one checkpoint rather than a run
    else:
        with pytest.raises(ValueError, match=r"has no averaged weights.*--export-weights raw"):
            load_trained(out, "ema")


def test_export_with_a_tokenizer_is_a_bundle_that_makes_pictures(bundle, tmp_path):
    codes = write_codes(tmp_path / "codes", grid=3, codebooks=3, codebook_size=TINY["codebook_size"])
    out = tmp_path / "run"
    assert train_gpt.main(arguments(codes, out)) == 0
    words = ["--export", tmp_path / "bundle", "--preview", bundle]
    assert train_gpt.main([*arguments(codes, out), *map(str, words)]) == 0
    generator = ImageGenerator.from_pretrained(tmp_path / "bundle")
    (picture,) = generator(["class 1"], seed=0)
    assert picture.size == (48, 48) and generator.names.names == ["class 0", "class 1", "class 2"]


def test_export_of_nothing_is_one_clear_line(codes, tmp_path, capsys):
    words = ["--export", str(tmp_path / "exported")]
    assert train_gpt.main([*arguments(codes, tmp_path / "nothing"), *words]) == 2
    error = capsys.readouterr().err
    assert "no complete checkpoint" in error and error.count("\n") == 1 and not (tmp_path / "exported").exists()


def test_weights_that_cannot_be_exported_are_refused_with_the_choices(codes, tmp_path, capsys):
    flags = arguments(codes, tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        train_gpt.main([*flags, "--export", str(tmp_path / "exported"), "--export-weights", "mean"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert all(part in error for part in ("--export-weights", "'auto', 'ema', 'raw'"))
    assert train_gpt.main([*flags, "--export-weights", "raw"]) == 2
    assert "--export-weights raw is for --export" in capsys.readouterr().err and not (tmp_path / "run").exists()


def named_source(folder: Path, names: list[str] | None, **changes) -> Path:
    """A generator folder, or with names a bundle as far as `start_from` reads it."""
    gpt = tiny_gpt(**{"num_classes": len(names), **changes} if names else changes)
    gpt.save_pretrained(folder / "generator" if names else folder)
    if names:
        ClassNames(names).save(folder)
    return folder


def test_fine_tuning_takes_classes_by_their_names(tmp_path):
    source = named_source(tmp_path / "bundle", ["dog", "cat", "Pig"])
    fresh, known = GPT(GPTConfig(**{**TINY, "num_classes": 4})), tiny_gpt(num_classes=3).state_dict()
    before = fresh.state_dict()["cls_embedding.embedding_table.weight"].clone()
    assert start_from(fresh, source, ["pig", "cow", "dog", "horse"]) == 2
    after = fresh.state_dict()
    table, theirs = after.pop("cls_embedding.embedding_table.weight"), known.pop("cls_embedding.embedding_table.weight")
    assert all(torch.equal(after[name], known[name]) for name in known)
    for ours, expected in enumerate([theirs[2], before[1], theirs[0], before[3], theirs[3]]):
        assert torch.equal(table[ours], expected)


@pytest.mark.parametrize(("count", "kept"), [(5, 5), (7, 0)])
def test_fine_tuning_without_names_keeps_classes_of_the_same_number_only(tmp_path, count, kept):
    source = named_source(tmp_path / "generator", None)
    fresh = GPT(GPTConfig(**{**TINY, "num_classes": count, "has_null_class": False}))
    before = fresh.cls_embedding.embedding_table.weight.detach().clone()
    assert start_from(fresh, source, [f"name {label}" for label in range(count)]) == kept
    expected = tiny_gpt().cls_embedding.embedding_table.weight[:5] if kept else before
    assert torch.equal(fresh.cls_embedding.embedding_table.weight, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_codebooks": 2}, r"trained on other codes: codebooks K = 3 instead of 2"),
        ({"codebook_size": 12}, r"trained on other codes: codebook size V = 11 instead of 12"),
        ({"num_positions": 16}, r"trained on other codes: positions L = 9 instead of 16"),
        ({"width": 64}, r"does not fit GPT"),
        ({"layers": 3}, r"does not fit GPT"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, changes, message):
    source = named_source(tmp_path / "generator", None)
    gpt = GPT(dataclasses.replace(tiny_gpt().config, num_classes=9, **changes))
    before = {name: tensor.clone() for name, tensor in gpt.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        start_from(gpt, source, None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in gpt.state_dict().items())


def test_a_run_starts_from_a_generator_of_other_classes_but_not_of_other_codes(codes, tmp_path, capsys):
    assert train_gpt.main(arguments(codes, tmp_path / "first")) == 0
    more = write_codes(tmp_path / "more", classes=5)
    frozen = {"init": tmp_path / "first" / "generator", "lr": 1e-12, "weight_decay": 0}
    assert train_gpt.main(arguments(more, tmp_path / "second", **frozen)) == 0
    assert "0 of 5 classes are known there" in capsys.readouterr().err
    first, second = (load_file(tmp_path / name / "generator" / "model.safetensors") for name in ("first", "second"))
    table = "cls_embedding.embedding_table.weight"
    assert len(first[table]) == 4 and len(second[table]) == 6
    torch.testing.assert_close(second[table][-1], first[table][-1])  # the null class
    for name in first.keys() - {table}:
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=1e-6)
    others = write_codes(tmp_path / "others", codebooks=3)
    assert train_gpt.main(arguments(others, tmp_path / "third", **frozen)) == 2
    error = capsys.readouterr().err
    assert "K = 2 instead of 3" in error and error.count("\n") == 1


@pytest.mark.slow
def test_two_killed_processes_resume_bit_for_bit(codes, tmp_path):
    """kill -9 of all processes at random moments, then SIGTERM, then to the end; FSDP2 with a background writer."""
    changes = {"steps": 300, "parallel": "fsdp", "dropout": 0, "save_every": 20, "keep": 2, "ema": 0.9}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "train_gpt.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(out: Path) -> subprocess.Popen:
        command = [sys.executable, *launcher, *arguments(codes, out, **changes, device="cpu")]
        return subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    assert start(tmp_path / "whole").wait(300) == 0
    rng, out = random.Random(os.getpid()), tmp_path / "killed"
    for sent in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
        before, process = names_of(out)[-1:], start(out)
        deadline = time.monotonic() + 200
        while process.poll() is None and names_of(out)[-1:] == before and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        os.killpg(process.pid, sent)
        process.wait(60)
        assert (out / "checkpoints" / "latest" / "meta.json").exists()
    assert start(out).wait(300) == 0
    whole, again = (load_file(tmp_path / name / "generator" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
