"""The demo: its data, figures that mean what they say, and one script from pictures to a measured bundle."""

import json
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from demo import make_demo, prepare_data
from demo.evaluate_demo import Evaluation
from demo.features import Reference, recognised, style
from llamagen_unitok.pipeline import ImageGenerator

CLASSES = [
    {"id": str(i), "file": f"{name}.png", "emoji": character, "name": name, "aliases": alias}
    for i, (name, character, alias) in enumerate([("pig", "🐷", "swine|hog"), ("dog", "🐶", ""), ("cat", "🐱", "hog")])
]
HELD_OUT = "fox"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """The three packages as npm unpacks them, with four emoji each, drawn on nothing."""
    folder = tmp_path / "packages"
    rng = np.random.default_rng(0)
    names = [row["name"] for row in CLASSES] + [HELD_OUT]
    for name, (_, inside, ending) in prepare_data.STYLES.items():
        pictures = folder / name / "package" / inside
        pictures.mkdir(parents=True)
        for emoji in names:
            pixels = rng.integers(0, 255, (64, 64, 4), dtype=np.uint8)
            pixels[:8, :, 3] = 0
            Image.fromarray(pixels).save(pictures / f"{emoji}{ending}", lossless=True)
        (folder / name / "package" / "emoji.json").write_text(json.dumps([{"image": f"{n}.png"} for n in names]))
    for module in (prepare_data, make_demo):
        monkeypatch.setattr(module, "read_classes", lambda: CLASSES)
    return folder


def test_pictures_are_composed_on_white_and_made_once(packages, tmp_path):
    data = tmp_path / "data"
    assert prepare_data.prepare(data, packages) == (3, 1)
    pictures = sorted(data.glob("*/*/*.png"))
    assert len(pictures) == 12
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.size == (128, 128) and picture.mode == "RGB"
            assert np.asarray(picture)[:8].min() == 255
    made = {path: path.stat().st_mtime_ns for path in pictures}
    pictures[0].unlink()
    prepare_data.prepare(data, packages)
    again = {path: path.stat().st_mtime_ns for path in sorted(data.glob("*/*/*.png"))}
    assert [path for path in made if made[path] != again[path]] == pictures[:1]


def test_without_npm_or_a_network_the_reason_is_one_line(tmp_path, monkeypatch, capsys):
    def failing(error):
        def run(*_args, **_options):
            raise error

        return run

    for error, message in (
        (FileNotFoundError(), "npm is not installed"),
        (subprocess.CalledProcessError(1, "npm", stderr="npm error code E404\n"), "npm could not fetch"),
    ):
        monkeypatch.setattr(subprocess, "run", failing(error))
        assert prepare_data.main(["--out", str(tmp_path / "data")]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "data" / "train").exists()


def test_recognition_and_style_are_those_of_the_nearest_real_picture():
    axes = torch.eye(6).view(2, 3, 6)  # 2 classes in 3 styles, each picture with an axis of its own
    reference = Reference(axes, [[]])
    pictures = axes[[0, 0, 1, 1], [2, 0, 1, 1]] + 0.1
    labels = [0, 1, 1, 0]
    assert recognised(pictures, labels, reference).tolist() == [True, False, True, False]
    assert style(pictures, reference).tolist() == [2, 0, 1, 1]  # of whichever class


def test_a_share_of_recognised_classes_counts_one_picture_a_class(bundle, tmp_path, capsys):
    evaluation = Evaluation(ImageGenerator.from_pretrained(bundle), tmp_path, tmp_path)
    evaluation.reference = Reference(torch.eye(15).view(5, 3, 15), [[]])
    axes = evaluation.reference.features
    evaluation.extract = lambda pictures: torch.stack([axes[0, 0] for _ in pictures])  # all look like class 0
    assert evaluation.recognised([1.5])["by_cfg"] == {"1": 0.2, "1.5": 0.2}
    assert evaluation.styles()["at_least_2_styles"] == 0
    assert evaluation.batches()["equal"] == 1
    assert "recognised, cfg 1: 20.0% of 5 classes" in capsys.readouterr().out


@pytest.mark.slow  # the demo's tokenizer at its size, and EfficientNet
def test_the_script_goes_from_pictures_to_a_measured_bundle_and_goes_on(packages, tmp_path, monkeypatch):
    short = {"steps": 2, "warmup-steps": 1, "batch-size": 3, "workers": 0, "save-every": 2}
    usual = make_demo.flags_from
    monkeypatch.setattr(
        make_demo, "flags_from", lambda path: [*usual(path), *(str(x) for k, v in short.items() for x in (f"--{k}", v))]
    )
    data = tmp_path / "data"
    data.mkdir()
    packages.rename(data / "packages")
    arguments = ["--work", str(tmp_path / "work"), "--data", str(data)]
    assert make_demo.main(arguments) == 0
    bundle = tmp_path / "work" / "emoji"
    generator = ImageGenerator.from_pretrained(bundle)
    assert generator.names.find("hog") == 0 and generator.names.find("🐶") == 1
    card = (bundle / "README.md").read_text()
    assert "| PSNR, heldout pictures |" in card and "Printed by `python demo/evaluate_demo.py`: 3 classes" in card
    weights = (bundle / "generator" / "model.safetensors").read_bytes()
    assert make_demo.main(arguments) == 0
    assert (bundle / "generator" / "model.safetensors").read_bytes() == weights
