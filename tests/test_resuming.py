"""Stopping and going on: what a resumed run may change, what a signal leaves, what a damaged checkpoint says."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_gpt
from llamagen_unitok.runtime import stop
from llamagen_unitok.runtime.checkpoint import checkpoint_path, complete_checkpoints, read_meta
from llamagen_unitok.runtime.distributed import World
from llamagen_unitok.training.data import CodeShards
from llamagen_unitok.training.generator import GeneratorObjective, GeneratorTraining, train_generator
from llamagen_unitok.training.loop import LoopConfig
from llamagen_unitok.training.tokenizer import TokenizerTraining, train_tokenizer
from tests.conftest import tiny_tokenizer
from tests.random_codes import write_codes

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
ALONE = World(0, 1, torch.device("cpu"))
SHAPE = "--layers 1 --heads 2 --width 32 --depth-layers 1 --ffn-multiple 16 --batch-size 4 --warmup-steps 1 --workers 0"


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return write_codes(tmp_path_factory.mktemp("codes") / "codes")


def words(codes: Path, out: Path, flags: str) -> list[str]:
    return ["--codes", str(codes), "--out", str(out), *SHAPE.split(), *flags.split()]


def train(codes: Path, out: Path, flags: str) -> int:
    return train_gpt.main(words(codes, out, flags))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "generator" / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_remedy_that_a_diverged_run_prints_is_one(codes, tmp_path, monkeypatch, capsys):
    forward = GeneratorObjective.forward

    def overflows_in_bf16(self, *batch, **options):
        loss, logged = forward(self, *batch, **options)
        bad = torch.is_autocast_enabled("cpu") and (tmp_path / "run" / "checkpoints" / "latest").exists()
        return (loss * float("nan") if bad else loss), logged

    monkeypatch.setattr(GeneratorObjective, "forward", overflows_in_bf16)
    flags = "--steps 6 --save-every 3 --no-async-save --lr 1e-3"
    assert train(codes, tmp_path / "run", flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not finite at step 3" in error and error.endswith("lower --lr, or resume with --precision fp32")
    assert train(codes, tmp_path / "run", f"{flags} --precision fp32 --lr 1e-4") == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("from step 3 on: ")]
    assert told == [
        "from step 3 on: --lr 0.0001 instead of 0.001",
        "from step 3 on: --precision fp32 instead of bf16",
    ]
    changes = [
        {"step": 3, "setting": "lr", "before": 1e-3, "after": 1e-4},
        {"step": 3, "setting": "precision", "before": "bf16", "after": "fp32"},
    ]
    newest = read_meta(checkpoint_path(tmp_path / "run", 6))
    assert newest["changes"] == changes and newest["loop"]["precision"] == "fp32"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["changes"] == changes


def test_a_run_can_be_extended_and_equals_one_that_was_meant_so_long(codes, tmp_path, capsys):
    constant = "--lr-schedule constant --lr 1e-3 --save-every 3"
    assert train(codes, tmp_path / "whole", f"--steps 6 {constant}") == 0
    assert train(codes, tmp_path / "run", f"--steps 3 {constant}") == 0
    capsys.readouterr()
    assert train(codes, tmp_path / "run", f"--steps 6 {constant}") == 0
    assert "from step 3 on: --steps 6 instead of 3" in capsys.readouterr().err
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    assert train(codes, tmp_path / "run", f"--steps 9 {constant}") == 0
    settings = [change["setting"] for change in read_meta(checkpoint_path(tmp_path / "run", 9))["changes"]]
    assert settings == ["steps", "steps"]
    capsys.readouterr()
    assert train(codes, tmp_path / "run", f"--steps 8 {constant}") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step-00000009 is past --steps 8" in error


@pytest.mark.parametrize("flag", ["--seed 1", "--ema 0.5", "--weight-decay 0.2", "--batch-size 2", "--beta2 0.9"])
def test_what_makes_another_run_of_it_is_refused(codes, tmp_path, capsys, flag):
    assert train(codes, tmp_path / "run", "--steps 2") == 0
    assert train(codes, tmp_path / "run", f"--steps 2 {flag}") == 2
    assert "holds a run with other settings" in capsys.readouterr().err.splitlines()[-1]


STOPPED = """
import os, signal, sys
import train_gpt
from llamagen_unitok.runtime.checkpoint import Checkpoints
from llamagen_unitok.training.generator import GeneratorObjective

def after_step(self, step, world):
    if step == int(sys.argv[1]) - 1:
        send(), send()

def save(self, step, state):
    result = real_save(self, step, state)
    if step == int(sys.argv[1]):
        send()
    return result

send = lambda: os.kill(os.getpid(), getattr(signal, sys.argv[2]))
real_save, Checkpoints.save = Checkpoints.save, save
GeneratorObjective.after_step = after_step
sys.exit(train_gpt.main(sys.argv[3:]))
"""


def stopped(codes: Path, out: Path, step: int, name: str, flags: str) -> int:
    """Exit code of a run that gets the signal twice after `step` steps, and once more in the save of that step."""
    script = out.with_suffix(".py")
    script.write_text(STOPPED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, step, name, *words(codes, out, flags)]
    return subprocess.run([str(word) for word in command], env=environment, timeout=240, capture_output=True).returncode


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signals_that_come_in_numbers_leave_the_checkpoint_of_the_last_step(codes, tmp_path, name):
    flags = "--steps 9 --save-every 100 --lr 1e-3"
    assert stopped(codes, tmp_path / "run", 4, name, flags) == 130
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == ["step-00000005"]
    # seconds are left after a signal: they are for the checkpoint
    assert not (tmp_path / "run" / "generator").exists()
    assert train(codes, tmp_path / "run", flags) == 0
    assert train(codes, tmp_path / "whole", flags) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_a_stop_at_a_regular_save_passes_no_model_on_and_one_at_the_end_does(codes, tmp_path):
    validated = "--log-every 1 --held-out 0.3 --validate-every 4"
    assert stopped(codes, tmp_path / "early", 3, "SIGTERM", f"--steps 9 --save-every 4 {validated}") == 130
    assert "validation_loss" not in (tmp_path / "early" / "metrics.jsonl").read_text()
    assert [path.name for path in complete_checkpoints(tmp_path / "early")] == ["step-00000004"]
    assert not (tmp_path / "early" / "generator").exists()
    assert stopped(codes, tmp_path / "end", 3, "SIGTERM", "--steps 4") == 0
    assert (tmp_path / "end" / "generator" / "model.safetensors").is_file()


def test_a_later_ctrl_c_ends_at_once_and_an_early_one_does_not(monkeypatch):
    with stop.stop_signals() as asked:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert asked.requested
        now = time.monotonic()
        monkeypatch.setattr(stop.time, "monotonic", lambda: now + stop.GRACE_SEC)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def trained_to_4(codes: Path, out: Path) -> Path:
    assert train(codes, out, "--steps 4 --save-every 2 --lr 1e-3") == 0
    return checkpoint_path(out, 4)


@pytest.mark.parametrize("left", ["", "{", "[]", '{"loop": {}}'])
def test_a_torn_description_counts_as_no_checkpoint(codes, tmp_path, left):
    newest = trained_to_4(codes, tmp_path / "run")
    whole = weights(tmp_path / "run")
    (newest / "meta.json").write_text(left)
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == ["step-00000002"]
    assert train(codes, tmp_path / "run", "--steps 4 --save-every 2 --lr 1e-3") == 0
    assert same(whole, weights(tmp_path / "run"))
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize("part", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("keep", [0, 100])
def test_a_damaged_checkpoint_is_named_with_the_remedy_which_is_one(codes, tmp_path, capsys, part, keep):
    newest = trained_to_4(codes, tmp_path / "run")
    whole = weights(tmp_path / "run")
    (newest / part).write_bytes((newest / part).read_bytes()[:keep])
    for extra in ([], ["--export", str(tmp_path / "exported")]):
        capsys.readouterr()
        assert train_gpt.main([*words(codes, tmp_path / "run", "--steps 4 --save-every 2 --lr 1e-3"), *extra]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"checkpoint {newest} cannot be loaded" in error and "move it away to go on from step-00000002" in error
        assert "Traceback" not in error and len(error) < 500
    shutil.move(newest, tmp_path / "away")
    assert train(codes, tmp_path / "run", "--steps 4 --save-every 2 --lr 1e-3") == 0
    assert same(whole, weights(tmp_path / "run"))


def test_a_run_goes_on_when_what_it_started_from_is_gone(codes, tmp_path):
    trained_to_4(codes, tmp_path / "first")
    start = Path(shutil.copytree(tmp_path / "first" / "generator", tmp_path / "start"))
    flags = f"--save-every 2 --lr 1e-3 --init {start} --steps"
    assert train(codes, tmp_path / "whole", f"{flags} 4") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "run", symlinks=True)
    shutil.rmtree(checkpoint_path(tmp_path / "run", 4))
    shutil.rmtree(start)
    assert train(codes, tmp_path / "run", f"{flags} 4") == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_a_tokenizer_goes_on_when_what_it_started_from_is_gone(tmp_path):
    rng = np.random.default_rng(0)
    for label in range(2):
        (tmp_path / "pictures" / str(label)).mkdir(parents=True)
        for i in range(2):
            picture = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
            picture.save(tmp_path / "pictures" / str(label) / f"{i}.png")
    tokenizer = tiny_tokenizer()
    start = tokenizer.save_pretrained(tmp_path / "start")
    settings = TokenizerTraining(images=tmp_path / "pictures", init=str(start))
    loop = LoopConfig(steps=4, save_every=2, batch_size=2, warmup_steps=0, workers=0, precision="fp32")

    def run(name: str) -> dict[str, torch.Tensor]:
        folder = train_tokenizer(tokenizer.config, settings, loop, out=tmp_path / name, resume="auto", world=ALONE)
        return load_file(folder / "model.safetensors")

    whole = run("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run", symlinks=True)
    shutil.rmtree(checkpoint_path(tmp_path / "run", 4))
    shutil.rmtree(start)
    assert same(whole, run("run"))


def test_checksums_are_read_by_one_process_for_all(codes, tmp_path, monkeypatch):
    class Second(World):
        """A process that hears from the main one what came out."""

        def share_outcome(self, compute):
            raise ValueError("told by the main process")

    read = []
    monkeypatch.setattr(CodeShards, "verify", lambda self: read.append(self.folder))
    settings, loop = GeneratorTraining(codes=codes, layers=1, heads=2, width=32, verify=True), LoopConfig()
    with pytest.raises(ValueError, match="told by the main process"):
        train_generator(settings, loop, out=tmp_path, resume="auto", world=Second(1, 2, torch.device("cpu")))
    assert not read
