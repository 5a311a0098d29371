"""The rehearsal: pictures to samples through the real commands, extraction and training with two processes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from demo.rehearse import main, pack_tars
from llamagen_unitok.training.data import CodeShards
from llamagen_unitok.training.sources import index_tar
from tokenizer import read_tokenizer_config

ROOT = Path(__file__).resolve().parents[1]
EMOJI = ROOT / "demo" / "data" / "train"


@pytest.fixture
def pictures(tmp_path):
    """The demo's pictures where they were fetched, else 4 classes of 3 drawn ones."""
    if EMOJI.is_dir():
        return EMOJI
    for label, colour in enumerate(("red", "green", "blue", "orange")):
        folder = tmp_path / "pictures" / f"class {label}"
        folder.mkdir(parents=True)
        for i in range(3):
            picture = Image.new("RGB", (128, 128), "white")
            ImageDraw.Draw(picture).ellipse((16 + 8 * i, 16, 96 + 8 * i, 100), fill=colour, outline="black", width=4)
            picture.save(folder / f"{i}.png")
    return tmp_path / "pictures"


def test_tar_shards_hold_the_pictures_and_labels_of_the_folder(tmp_path):
    for label in range(3):
        (tmp_path / "in" / f"c{label}").mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), (10 * label, 100 * i, 0)).save(tmp_path / "in" / f"c{label}" / f"{i}.png")
    names = pack_tars(tmp_path / "in", tmp_path / "out", classes=2, per_tar=3)
    assert names.names == ["c0", "c1"]
    tables = [index_tar(path, "label") for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert [table["label"].tolist() for table in tables] == [[0, 0, 1], [1]]
    last = (tmp_path / "out" / "train-00001.tar").read_bytes()
    start, size = tables[1]["offset"][0], tables[1]["size"][0]
    assert last[start : start + size] == (tmp_path / "in" / "c1" / "1.png").read_bytes()


@pytest.mark.slow
def test_rehearsal_from_pictures_to_samples(pictures, tmp_path, capfd):
    work = tmp_path / "work"
    assert main(["--images", str(pictures), "--work", str(work), "--classes", "4", "--per-tar", "5"]) == 0
    printed = capfd.readouterr()
    assert len(list((work / "tars").glob("*.tar"))) == 3
    shards = CodeShards(work / "codes")
    shards.verify()
    assert len(shards) == 12 and np.bincount(shards.labels()).tolist() == [3, 3, 3, 3]
    config = read_tokenizer_config(ROOT / "checkpoints" / "emoji")
    assert shards.meta.num_codebooks == config.num_codebooks and len(shards.meta.views) == 2
    assert float(printed.out.split("PSNR ")[1].split()[0]) > 15  # decoded codes look like their originals
    losses = [json.loads(line)["loss"] for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.5 and losses[0] < math.log(config.codebook_size) + 0.5
    assert (work / "codes" / "verify.png").is_file() and (work / "run" / "preflight.png").is_file()
    sheet = np.asarray(Image.open(work / "samples.png").convert("RGB"))
    assert min(sheet.shape[:2]) >= config.img_size and sheet.std() > 10
