"""Sweeps of more than one process, and of one that is killed: the same table as of one that ran through."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sweep
from llamagen_unitok.evaluation import figures, samples
from tests.tiny_extractor import TinyExtractor, pictures

ROOT = Path(sweep.__file__).resolve().parent
pytestmark = pytest.mark.usefixtures("one_thread")

# sweep.py with a tiny network; with KILL_AT=N it is killed when the samples of the N-th setting are there.
SCRIPT = """
import os, signal, sys
import sweep
from llamagen_unitok.evaluation import figures, samples
from llamagen_unitok.evaluation import sweep as library
from tests.tiny_extractor import TinyExtractor

figures.EXTRACTORS["inception"] = TinyExtractor
samples.PART_PICTURES = 5
measured, real = [], library.evaluate_samples

def evaluate(*arguments, **options):
    measured.append(arguments)
    if os.environ.get("KILL_AT") == str(len(measured)):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)

library.evaluate_samples = evaluate
sys.exit(sweep.main(sys.argv[1:]))
"""


@pytest.fixture
def arguments(bundle, tmp_path, monkeypatch) -> list[str]:
    """Of a sweep over two settings, in folders ./one and ./other that hold its reference."""
    monkeypatch.setitem(figures.EXTRACTORS, "inception", TinyExtractor)
    monkeypatch.setattr(samples, "PART_PICTURES", 5)
    (tmp_path / "run.py").write_text(SCRIPT)
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "real.npz", arr_0=pictures(40, seed=3, size=48))
    monkeypatch.chdir(tmp_path)
    words = ["--checkpoint", bundle, "--reference", "real.npz", "--out", "sweep", "--device", "cpu", "--batch-size", 5]
    words = [str(word) for word in [*words, "--cfg", "1.0,1.5", "--num-samples", 15]]
    monkeypatch.setattr(sys, "argv", ["run.py", *words])  # the command is a part of a row
    return words


def start(folder: str, arguments: list[str], **environment: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, "../run.py", *arguments], cwd=folder, env=environment)


def here(folder: str, arguments: list[str], monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        assert sweep.main(arguments) == 0


def rows(folder: str) -> list[dict]:
    """Without the version of the code, which may change while tests run."""
    lines = Path(folder, "sweep", "results.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "code_version"} for line in lines]


def test_a_sweep_killed_between_samples_and_row_measures_the_samples_that_are_there(arguments, monkeypatch):
    assert start("one", arguments, KILL_AT="2").wait(timeout=240) == -signal.SIGKILL
    assert len(rows("one")) == 1 and len(list(Path("one/sweep/samples").glob("*.npz"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(samples, "generate", lambda *_, **__: pytest.fail("sampled twice"))
        here("one", arguments, monkeypatch)
    here("other", arguments, monkeypatch)
    assert rows("one") == rows("other") and len(rows("one")) == 2
    assert not list(Path("one/sweep/samples").iterdir())


def test_two_processes_make_the_table_that_one_makes(arguments, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # what torchrun sets, without the seconds that it takes to start itself
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    started = [start("one", arguments, RANK=rank, **group) for rank in "01"]
    try:
        assert [process.wait(timeout=240) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    here("other", arguments, monkeypatch)
    for two, one in zip(rows("one"), rows("other"), strict=True):
        assert two.keys() == one.keys()
        for name, value in one.items():
            exact = not isinstance(value, float)
            assert two[name] == (value if exact else pytest.approx(value, rel=1e-9, abs=1e-12)), name
    assert len(list(Path("one/sweep/pictures").iterdir())) == 2
    assert Path("one/sweep/report.md").exists() and not list(Path("one/sweep/samples").iterdir())
