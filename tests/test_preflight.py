"""Preflight: what would train for days on wrong codes, classes or disks is named before the first step."""

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_gpt
from llamagen_unitok import GPT, GPTConfig
from llamagen_unitok.labels import ClassNames
from llamagen_unitok.training.data import CodeMeta, CodeShards, read_meta, shard_name, write_meta, write_shard
from modelfolder import content_hash, file_hash
from tests.conftest import NAMES, tiny_tokenizer
from tests.tiny_generator import TINY

SIZE = ["--layers", 2, "--heads", 4, "--width", 32, "--depth-layers", 2, "--ffn-multiple", 32]
LOOP = ["--steps", 2, "--warmup-steps", 1, "--batch-size", 4, "--workers", 0, "--device", "cpu"]
K, V, L = TINY["num_codebooks"], TINY["codebook_size"], TINY["num_positions"]


def write_codes(folder: Path, tokenizer_hash: str, **changes) -> Path:
    """20 pictures in two shards, 4 of each class; codes at random."""
    folder.mkdir()
    codes = np.random.default_rng(0).integers(0, V, (20, 1, L, K))
    labels = np.arange(20) % 5
    checksums = [
        file_hash(write_shard(folder, i, 2, codes[10 * i : 10 * i + 10], labels[10 * i : 10 * i + 10])) for i in (0, 1)
    ]
    meta = CodeMeta("tiny", tokenizer_hash, 48, 3, K, V, ["centre"], NAMES, [10, 10], checksums)
    write_meta(folder, replace(meta, **changes))
    return folder


@pytest.fixture
def codes(bundle, tmp_path):
    return write_codes(tmp_path / "codes", content_hash(bundle / "tokenizer"))


def check(codes, *flags, out="run", mode="--check") -> int:
    arguments = ["--codes", codes, "--out", codes.parent / out, *SIZE, *LOOP, *flags, *([mode] if mode else [])]
    return train_gpt.main([str(a) for a in arguments])


def test_a_sound_run_is_told_in_one_screen_and_nothing_starts(codes, bundle, capsys):
    assert check(codes, "--preview", bundle, "--class-names", bundle / "labels.json") == 0
    screen = capsys.readouterr().out
    assert len(screen.splitlines()) < 24 and "!" not in screen
    for part in ("20 pictures × 1 views", "K=3, V=11", "4 to 4 pictures each", "0 is 'dog'", "4 is 'cat'", "0.4 epochs",
                 "all 2 shards are whole", "made these codes", "steps 0 to 2", "1 × cpu"):  # fmt: skip
        assert part in screen, part
    out = codes.parent / "run"
    assert [path.name for path in out.iterdir()] == ["preflight.png"]


def test_the_picture_shows_codes_decoded(codes, bundle):
    assert check(codes, "--preview", bundle) == 0
    sheet = np.asarray(Image.open(codes.parent / "run" / "preflight.png").convert("RGB")).astype(int)
    tokenizer, shards = tiny_tokenizer(), CodeShards(codes)
    found = 0
    for index in range(20):
        image = tokenizer.decode(torch.from_numpy(shards[index, 0][1])[None])[0]
        pixels = (127.5 * image + 128).clamp(0, 255).to(torch.uint8).movedim(0, -1).numpy().astype(int)
        windows = np.lib.stride_tricks.sliding_window_view(sheet, (48, 48, 3))[:, :, 0]
        found += int((np.abs(windows[:, :, ::6, ::6] - pixels[::6, ::6]).max(axis=(2, 3, 4)) <= 1).any())
    assert found == 8


def test_every_start_shows_the_screen_on_stderr_and_trains(codes, capsys):
    assert check(codes, mode=None) == 0
    printed = capsys.readouterr()
    assert "K=3, V=11" in printed.err and "all 2 shards" not in printed.err
    assert printed.out.split() == [str(codes.parent / "run" / "generator")]
    assert check(codes) == 0
    assert "steps 2 to 2" in capsys.readouterr().out


def refused(capsys, code: int) -> str:
    printed = capsys.readouterr()
    assert code == 2 and "Traceback" not in printed.err
    return printed.err.splitlines()[-1]


def test_another_tokenizer_is_a_doubt_that_fails_the_check_but_not_the_start(codes, tmp_path, capsys):
    other = tiny_tokenizer(seed=1).save_pretrained(tmp_path / "other")
    assert "made by another tokenizer" in refused(capsys, check(codes, "--preview", other))
    assert check(codes, "--preview", other, mode=None) == 0
    assert "!  the codes were made by another tokenizer" in capsys.readouterr().err


def test_a_check_without_a_tokenizer_takes_the_one_that_the_codes_name(codes, bundle, tmp_path, capsys):
    tokenizer = Path(shutil.copytree(bundle / "tokenizer", tmp_path / "tokenizer"))
    write_meta(codes, replace(read_meta(codes), tokenizer=str(tokenizer)))
    assert check(codes) == 0 and "made these codes" in capsys.readouterr().out
    tiny_tokenizer(seed=1).save_pretrained(tokenizer)  # as when it was trained on after the extraction
    assert "made by another tokenizer" in refused(capsys, check(codes))


def test_a_start_without_a_tokenizer_looks_at_the_one_that_the_codes_name(codes, bundle, tmp_path, capsys):
    tokenizer = Path(shutil.copytree(bundle / "tokenizer", tmp_path / "tokenizer"))
    write_meta(codes, replace(read_meta(codes), tokenizer=str(tokenizer)))
    assert check(codes, mode=None) == 0 and "made these codes" in capsys.readouterr().err
    assert (codes.parent / "run" / "preflight.png").is_file()
    tiny_tokenizer(seed=1).save_pretrained(tokenizer)
    assert check(codes, mode=None) == 0 and "made by another tokenizer" in capsys.readouterr().err
    tiny_tokenizer(num_codebooks=2, codebook_size=16).save_pretrained(tokenizer)  # or a folder of that name elsewhere
    assert check(codes, mode=None) == 0
    assert "!  what the codes call their tokenizer is another one now" in capsys.readouterr().err
    assert "is another one now" in refused(capsys, check(codes))
    shutil.rmtree(tokenizer)
    shutil.copytree(bundle / "tokenizer", tokenizer)
    (tokenizer / "model.safetensors").write_bytes(b"torn")
    assert check(codes, mode=None) == 0
    assert "does not draw them" in capsys.readouterr().err


def test_the_screen_tells_the_recipe_and_how_the_run_is_computed(codes, capsys):
    flags = ["--recipe", "llamagen", "--accumulate", 2, "--compile", "off", "--dropout", 0.05]
    flags += ["--checkpoint-activations", "selective"]
    assert check(codes, *flags) == 0
    screen = " ".join(capsys.readouterr().out.split())
    for part in ("recipe llamagen, differing in: ", "batch_size 4 instead of 256", "dropout 0.05 instead of 0.1",
                 "dropout 0.05, of classes 0.1", "in 2 parts; parallel auto, compile off",
                 "recomputed activations selective"):  # fmt: skip
        assert part in screen, part


def test_a_tokenizer_of_other_shape_is_refused(codes, tmp_path, capsys):
    other = tiny_tokenizer(num_codebooks=2, codebook_size=16).save_pretrained(tmp_path / "other")
    error = refused(capsys, check(codes, "--preview", other, mode=None))
    assert "codebooks K = 2 instead of 3, codebook size V = 16 instead of 11" in error
    assert not (codes.parent / "run").exists()


def test_another_class_order_is_refused_at_every_start(codes, tmp_path, capsys):
    ClassNames([NAMES[1], NAMES[0], *NAMES[2:]]).save(tmp_path)
    for mode in ("--check", None):
        error = refused(capsys, check(codes, "--class-names", tmp_path / "labels.json", mode=mode))
        assert "class of the codes 0 is 'dog', which is class 1 (dog), but class 0 is zebra face" in error
    assert "do not fit 3 class names" in refused(capsys, check(codes, "--class-names", 3))


def test_a_start_from_a_bundle_is_compared_with_it(codes, bundle, bundle_without_null_class, tmp_path, capsys):
    assert check(codes, "--init", bundle) == 0
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    ClassNames([*NAMES[:3], NAMES[4], NAMES[3]]).save(other)
    shutil.rmtree(other / "tokenizer")
    tiny_tokenizer(seed=1).save_pretrained(other / "tokenizer")
    error = refused(capsys, check(codes, "--init", other))
    assert "is not, byte for byte, the one that made the codes" in error and "has other class names" in error
    meta = read_meta(codes)
    small = write_codes(tmp_path / "small", meta.tokenizer_hash)
    write_meta(small, replace(meta, codebook_size=12))
    assert "codebook size V = 11 instead of 12" in refused(capsys, check(small, "--init", bundle))


def test_damaged_shards_are_found_by_the_check(codes, capsys):
    path = codes / shard_name(1, 2)
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    assert check(codes, mode=None) == 0
    capsys.readouterr()
    assert "shard-00001-of-00002.safetensors is damaged" in refused(capsys, check(codes))


def test_codes_and_labels_out_of_range_and_dead_codebooks_are_found_at_every_start(codes, tmp_path, capsys):
    meta = read_meta(codes)
    for changes, message in (
        ({"codebook_size": 10}, "has code 10, but codebooks have 10 entries"),
        ({"class_names": NAMES[:4]}, "has labels 0 to 4, but 4 class names"),
    ):
        write_meta(codes, replace(meta, **changes))
        assert message in refused(capsys, check(codes, mode=None))
    write_meta(codes, meta)
    shards = CodeShards(codes)
    for index in (0, 1):
        labels, stored = shards.entries(range(10 * index, 10 * index + 10))
        stored[..., 2] = 7
        write_shard(codes, index, 2, stored, labels)
    checksums = [file_hash(codes / shard_name(i, 2)) for i in (0, 1)]
    write_meta(codes, replace(meta, checksums=checksums))
    assert "codebook 2 has code 7 everywhere" in refused(capsys, check(codes))


def test_a_full_disk_is_named_before_the_run(codes, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 100_000))
    error = refused(capsys, check(codes, mode=None))
    assert "GB are free: make room, or give a smaller --keep" in error
    shape = {name: value for name, value in TINY.items() if name not in ("layers", "heads", "width")}
    parameters = sum(p.numel() for p in GPT(GPTConfig(2, 4, 32, **shape)).parameters())
    # at least two kept and one being written, each with weights and two means in fp32
    needed = 3 * 3 * 4 * parameters + 2 * 4 * parameters
    assert f"needs {needed / 1e9:.3g} GB" in error
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed))
    assert check(codes) == 0
