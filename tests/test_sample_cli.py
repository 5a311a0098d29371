"""sample.py as a user meets it: what it writes, and one clear line for what cannot be."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
from tests.conftest import NAMES, tiny_tokenizer

ROOT = Path(sample.__file__).resolve().parent


@pytest.fixture
def run(bundle, tmp_path, monkeypatch, capsys):
    """Run sample.py in an empty folder: arguments → (exit code, stdout, stderr). The tiny bundle is the shipped one."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sample, "SHIPPED", bundle)

    def call(*arguments) -> tuple[int, str, str]:
        try:
            code = sample.main([*map(str, arguments), "--device", "cpu"])
        except SystemExit as stop:  # argparse
            code = stop.code
        return code, *capsys.readouterr()

    return call


def written() -> list[str]:
    return sorted(path.name for path in Path().rglob("*"))


def test_default_run_writes_one_sheet_named_after_class_guidance_and_seed(run):
    code, out, err = run("--class", "pig", "--cfg", "1.0")
    assert code == 0, err
    assert written() == ["pig-cfg1-seed0.png"]
    lines = out.splitlines()
    assert lines[0] == "pig-cfg1-seed0.png"
    assert re.fullmatch(r"4 pictures in [\d.]+ s \([\d.]+ images/s\)", lines[1])
    assert "generating" in err
    with Image.open("pig-cfg1-seed0.png") as sheet:
        assert sheet.width >= 4 * 48
        assert sheet.height > 48


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--class", "2", "--cfg", "1.5", "--seed", "7"], "pig-cfg1.5-seed7.png"),
        (["--class", "pig,zebra face", "--num", "1"], "pig-zebra-face-cfg1-seed0.png"),
        (["--class", "0,1,2,3,4", "--num", "1"], "dog-zebra-face-pig-and-2-more-cfg1-seed0.png"),
        (["--class", "hot dog, plain", "--num", "1"], "hot-dog-plain-cfg1-seed0.png"),
        (["--class", "pig", "--temperature", "0.5", "--top-k", "3"], "pig-cfg1-seed0-temperature0.5-top-k3.png"),
        (["--class", "🐷", "--num", "1", "--out", "some.webp"], "some.webp"),
    ],
)
def test_the_sheets_name_says_what_it_shows(run, arguments, name):
    code, out, err = run(*arguments)
    assert code == 0, err
    assert written() == [name]
    assert out.startswith(f"{name}\n")


def test_npz_holds_pixels_and_labels(run):
    code, out, err = run("--class", "pig,dog", "--num", "3", "--npz", "samples.npz", "--batch-size", "4")
    assert code == 0, err
    assert written() == ["samples.npz"]
    assert out.startswith("samples.npz\n6 pictures in ")
    with np.load("samples.npz") as samples:
        assert sorted(samples.files) == ["arr_0", "label"]
        assert samples["arr_0"].shape == (6, 48, 48, 3)
        assert samples["arr_0"].dtype == np.uint8
        assert samples["label"].tolist() == [2, 2, 2, 0, 0, 0]
        assert samples["label"].dtype == np.int64


def test_single_pictures_equal_those_of_the_npz(run):
    arguments = ["--class", "pig", "--num", "2", "--save-images", "pictures", "--npz", "a.npz", "--out", "sheet.png"]
    code, _, err = run(*arguments)
    assert code == 0, err
    files = sorted(Path("pictures").iterdir())
    assert [p.name for p in files] == ["0002-pig-cfg1-seed0-00000.png", "0002-pig-cfg1-seed0-00001.png"]
    assert Path("sheet.png").exists()
    with np.load("a.npz") as samples:
        for path, pixels in zip(files, samples["arr_0"], strict=True):
            with Image.open(path) as picture:
                assert np.array_equal(np.asarray(picture), pixels)


def test_the_same_command_writes_the_same_bytes_and_another_class_beside_it_changes_nothing(run):
    run("--class", "pig", "--npz", "a.npz")
    run("--class", "pig", "--npz", "b.npz")
    run("--class", "dog,pig", "--npz", "c.npz")
    pixels = {name: np.load(f"{name}.npz")["arr_0"] for name in "abc"}
    assert np.array_equal(pixels["a"], pixels["b"])
    assert np.array_equal(pixels["a"], pixels["c"][4:])


def test_engines_and_a_proposed_batch_size_draw_the_same_pictures(run):
    arguments = ("--class", "pig,dog", "--num", "3", "--npz")
    pixels = []
    for name, more in {"a": [], "b": ["--engine", "eager"], "c": ["--engine", "graph", "--batch-size", "auto"]}.items():
        code, out, err = run(*arguments, f"{name}.npz", *more)
        assert code == 0, err
        pixels.append(np.load(f"{name}.npz")["arr_0"])
    assert out.startswith("batch size 8\n")  # six pictures need no more, whatever memory there is
    assert np.array_equal(pixels[0], pixels[1])
    assert np.array_equal(pixels[0], pixels[2])


@pytest.mark.parametrize(("decoder", "levels"), [("fast", 0.02), ("bf16", 2)])
def test_faster_decoders_draw_almost_the_same_pixels(run, decoder, levels):
    run("--class", "pig", "--npz", "plain.npz")
    code, _, err = run("--class", "pig", "--npz", "other.npz", "--decoder", decoder)
    assert code == 0, err
    plain, other = (np.load(name)["arr_0"].astype(int) for name in ("plain.npz", "other.npz"))
    assert np.abs(plain - other).mean() <= levels


def test_list_classes_prints_ids_and_names(run):
    code, out, _ = run("--list-classes")
    assert code == 0
    assert out.splitlines() == [f"{label}\t{name}" for label, name in enumerate(NAMES)]
    assert written() == []


WRONG = {
    "class out of range": (["--class", "5"], "no class 5: ids are 0 to 4"),
    "misspelt class": (["--class", "zebrra"], 'did you mean "zebra face"'),
    "no class": ([], "--class is missing"),
    "negative guidance": (["--class", "0", "--cfg", "-1"], "--cfg"),
    "guidance of nan": (["--class", "0", "--cfg", "nan"], "--cfg"),
    "guidance of inf": (["--class", "0", "--cfg", "inf"], "--cfg"),
    "guidance of a word": (["--class", "0", "--cfg", "strong"], "--cfg: invalid float value: 'strong'"),
    "top-p of 0": (["--class", "0", "--top-p", "0"], "--top-p"),
    "top-p above 1": (["--class", "0", "--top-p", "1.1"], "--top-p"),
    "negative top-k": (["--class", "0", "--top-k", "-1"], "--top-k"),
    "negative temperature": (["--class", "0", "--temperature", "-0.1"], "--temperature"),
    "negative seed": (["--class", "0", "--seed", "-1"], "--seed"),
    "no pictures": (["--class", "0", "--num", "0"], "--num"),
    "no batch": (["--class", "0", "--batch-size", "0"], "--batch-size"),
    "batch size of a word": (["--class", "0", "--batch-size", "many"], "'many' is neither a whole number nor auto"),
    "no threads": (["--class", "0", "--threads", "0"], "--threads must be a whole number of at least 1, got 0"),
    "unknown engine": (["--class", "0", "--engine", "warp"], "--engine"),
    "unknown decoder": (["--class", "0", "--decoder", "slow"], "--decoder"),
    "unknown schedule": (["--class", "0", "--cfg-schedule", "cosin"], "--cfg-schedule"),
    "unknown flag": (["--class", "0", "--guidance", "2"], "--guidance"),
    "shortened flag": (["--class", "0", "--temp", "1"], "--temp"),
    "missing checkpoint": (["--class", "0", "--checkpoint", "./nowhere"], "no model folder at nowhere"),
    "empty checkpoint": (["--class", "0", "--checkpoint", "."], "tokenizer"),
    "output in a missing folder": (["--class", "0", "--out", "gone/a.png"], "--out gone/a.png cannot be written"),
    "output that is a folder": (["--class", "0", "--out", ".."], "--out"),
    "output of unknown kind": (["--class", "0", "--out", "a.txt"], "--out a.txt must end in"),
    "unwritable npz": (["--class", "0", "--npz", "/proc/a.npz"], "--npz /proc/a.npz cannot be written"),
    "unwritable folder": (["--class", "0", "--save-images", "gone/a"], "--save-images gone/a cannot be written"),
    "unknown device": (["--class", "0", "--device", "abacus"], "--device abacus"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_in_one_line_and_leaves_nothing(run, monkeypatch, capsys, case):
    arguments, message = WRONG[case]
    if case == "unknown device":
        code, out, err = sample.main(arguments), *capsys.readouterr()
    else:
        code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert message in err
    assert written() == []


def test_truncated_weights_end_in_one_line(run, damaged_bundle):
    code, _, err = run("--class", "0", "--checkpoint", damaged_bundle)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "damaged or cut short" in err
    assert written() == []


@pytest.mark.parametrize(
    ("changes", "message"), [({"num_codebooks": 4, "width": 32}, "K = 4"), ({"codebook_size": 9}, "V = 9")]
)
def test_a_tokenizer_that_does_not_fit_ends_in_one_line(run, tmp_path, changes, message):
    tiny_tokenizer(**changes).save_pretrained(tmp_path / "other")
    code, _, err = run("--class", "0", "--tokenizer", tmp_path / "other")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert message in err
    assert written() == []


def test_guidance_without_a_null_class_ends_in_one_line(run, bundle_without_null_class):
    code, _, err = run("--class", "0", "--cfg", "1.5", "--checkpoint", bundle_without_null_class)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "null class" in err
    assert written() == []
    assert run("--class", "0", "--checkpoint", bundle_without_null_class)[0] == 0


@pytest.mark.parametrize("flag", ["--npz", "--out"])
def test_a_failed_write_leaves_nothing_and_keeps_what_was_there(run, monkeypatch, flag):
    target = Path("a.npz" if flag == "--npz" else "a.png")
    target.write_bytes(b"earlier")

    def fail(file, *_, **__):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    monkeypatch.setattr(Image.Image, "save", lambda self, file, **_: fail(file))
    code, _, err = run("--class", "0", flag, target)
    assert code == 2
    assert err.splitlines()[-1] == "disk full"
    assert written() == [target.name]
    assert target.read_bytes() == b"earlier"


def test_ctrl_c_ends_with_130(run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("llamagen_unitok.pipeline.generate", interrupt)
    code, _, err = run("--class", "0")
    assert code == 130
    assert err.splitlines()[-1] == "interrupted"
    assert written() == []


def test_help_fits_a_screen(run):
    code, out, _ = run("--help")
    assert code == 0
    assert len(out.splitlines()) <= 45
    assert max(map(len, out.splitlines())) <= 120


def command(*arguments, cwd) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, ROOT / "sample.py", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_real_command_draws_from_any_folder(bundle, tmp_path):
    done = command("--class", "pig", "--checkpoint", bundle, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["pig-cfg1-seed0.png"]
    assert done.stdout.startswith("pig-cfg1-seed0.png\n4 pictures in ")


def test_the_real_command_refuses_a_wrong_class_in_one_line(bundle, tmp_path):
    done = command("--class", "zebrra", "--checkpoint", bundle, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "zebra face" in done.stderr


def test_a_hub_id_out_of_reach_ends_in_one_line(tmp_path):
    done = command("--class", "0", "--checkpoint", "nobody/nothing", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "nobody/nothing" in done.stderr


def test_a_reader_that_stops_early_is_no_error(bundle):
    listing = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$0" "$1" --list-classes --checkpoint "$2" | true', sys.executable,
         ROOT / "sample.py", bundle],
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert listing.stderr == ""
