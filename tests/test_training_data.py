"""Code shards and the order of data: what is written is what is read, and damage is named."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.loader import anonymous_bytes, random_shards
from llamagen_unitok.runtime.distributed import World
from llamagen_unitok.training.data import (
    CodeMeta,
    CodeShards,
    StepSampler,
    TrainingCodes,
    shard_name,
    step_batches,
    write_meta,
    write_shard,
)
from modelfolder import file_hash

ROOT = Path(__file__).resolve().parents[1]
K, V, GRID, VIEWS = 3, 50, 2, ["centre", "centre mirrored"]


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    sizes = [4, 3]
    checksums = []
    for index, size in enumerate(sizes):
        codes = rng.integers(0, V, (size, len(VIEWS), GRID**2, K))
        path = write_shard(tmp_path, index, len(sizes), codes, rng.integers(0, 5, size))
        checksums.append(file_hash(path))
    names = [f"class {i}" for i in range(5)]
    write_meta(tmp_path, CodeMeta("tiny", "0" * 64, 32, GRID, K, V, VIEWS, names, sizes, checksums))
    return tmp_path


def test_codes_come_back_as_written(tmp_path, folder):
    rng = np.random.default_rng(0)
    shards = CodeShards(folder)
    shards.verify()
    assert len(shards) == 7
    first = rng.integers(0, V, (4, len(VIEWS), GRID**2, K))
    labels = rng.integers(0, 5, 4)
    for i in range(4):
        for view in range(len(VIEWS)):
            label, codes = shards[i, view]
            assert label == labels[i] and codes.dtype == np.int64
            assert np.array_equal(codes, first[i, view])


def test_a_missing_shard_is_named(folder):
    (folder / shard_name(1, 2)).unlink()
    with pytest.raises(ValueError, match=r"shard-00001-of-00002.*missing"):
        CodeShards(folder)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_shard_cut_short_is_named(folder, keep):
    path = folder / shard_name(0, 2)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="shard-00000-of-00002"):
        CodeShards(folder)


def test_a_flipped_bit_is_found_by_verify(folder):
    path = folder / shard_name(0, 2)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    shards = CodeShards(folder)
    with pytest.raises(ValueError, match=r"shard-00000-of-00002.*damaged"):
        shards.verify()


def test_a_shard_of_other_shape_is_named(folder):
    write_shard(folder, 1, 2, np.zeros((3, 2, GRID**2, K + 1), int), np.zeros(3, int))
    with pytest.raises(ValueError, match=r"shard-00001-of-00002.*expected"):
        CodeShards(folder)


def test_an_unfinished_or_foreign_folder_is_refused(folder, tmp_path):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "format": "other 9"}))
    with pytest.raises(ValueError, match="format 'other 9'"):
        CodeShards(folder)
    (folder / "meta.json").unlink()
    with pytest.raises(ValueError, match="did not finish"):
        CodeShards(folder)


def test_codes_beyond_uint16_are_refused(tmp_path):
    with pytest.raises(ValueError, match="uint16"):
        write_shard(tmp_path, 0, 1, np.full((1, 1, 4, 1), 70000), np.zeros(1, int))
    assert not list(tmp_path.iterdir())


def _world(rank=0, size=1):
    return World(rank=rank, size=size, device=torch.device("cpu"))


@given(length=st.integers(1, 40), batch=st.sampled_from([2, 4, 8]), first=st.integers(0, 9), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_order_follows_from_seed_and_step_alone(length, batch, first, seed):
    whole = list(StepSampler(length, batch, 0, 10, seed, _world()))
    assert list(StepSampler(length, batch, first, 10, seed, _world())) == whole[first:]
    halves = [list(StepSampler(length, batch, 0, 10, seed, _world(rank, 2))) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    epoch = [index for step in whole for index, draw in step if draw < length]
    assert len(set(epoch)) == len(epoch)


def test_every_view_is_drawn_and_draws_repeat(folder):
    dataset = TrainingCodes(CodeShards(folder), seed=0)
    shards = dataset.shards
    seen = set()
    for draw in range(20):
        _, codes = dataset[0, draw]
        assert torch.equal(codes, dataset[0, draw][1])
        seen.add(next(v for v in range(2) if np.array_equal(shards[0, v][1], codes.numpy())))
    assert seen == {0, 1}


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="does not divide into 2 processes"):
        StepSampler(10, 3, 0, 5, 0, _world(0, 2))


def test_every_damaged_shard_is_named_and_copies_map_the_files_anew(folder):
    shards = CodeShards(folder)
    copied = pickle.loads(pickle.dumps(shards))
    assert len(pickle.dumps(shards)) < 1000 and np.array_equal(copied[5, 1][1], shards[5, 1][1])
    for index in range(2):
        path = folder / shard_name(index, 2)
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"shard-00000-of-00002.*; .*shard-00001-of-00002.*run extract_codes.py"
    ) as error:
        CodeShards(folder)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def imagenet_sized(tmp_path_factory):
    """1,281,167 entries in 65 shards; a small grid and few codes, so that they take 30 MB."""
    folder = tmp_path_factory.mktemp("large")
    random_shards(folder, 1_281_167, grid=2, num_codebooks=2, codebook_size=16)
    return folder


def test_a_shard_set_of_imagenets_size_opens_at_once_and_is_read_with_flat_memory(imagenet_sized):
    start = time.process_time()
    shards = CodeShards(imagenet_sized)
    assert time.process_time() - start < 1
    assert len(shards) == 1_281_167
    assert [shards[i, 0][0] for i in (0, 19_999, 20_000, 1_281_166)] == [0, 999, 0, 166]
    epoch = len(shards) // 1024
    batches = step_batches(
        TrainingCodes(shards, 0),
        global_batch=1024,
        first_step=epoch - 60,
        steps=epoch + 60,
        seed=0,
        workers=0,
        world=_world(),
    )
    memory, slowest = [], 0.0
    for _ in range(120):
        start = time.process_time()
        labels, codes = next(batches)
        if memory:
            slowest = max(slowest, time.process_time() - start)
        memory.append(anonymous_bytes())
    assert codes.shape == (1024, 4, 2) and labels.max() < 1000
    # 50 batches that were kept would be 3.7 MB; where the epochs meet, the order of one (10 MB) takes another's place
    assert memory[58] - memory[8] < 1e6 and memory[-1] - memory[-50] < 1e6
    assert max(memory) - memory[8] < 25e6
    assert slowest < 0.5  # where the epochs meet too


@pytest.mark.slow
def test_training_on_a_shard_set_of_imagenets_size_has_flat_memory(imagenet_sized, tmp_path):
    arguments = ["--codes", imagenet_sized, "--out", tmp_path / "run", "--layers", 1, "--heads", 2, "--width", 16]
    arguments += ["--depth-layers", 1, "--ffn-multiple", 16, "--steps", 600, "--warmup-steps", 1, "--batch-size", 64]
    arguments += ["--log-every", 100, "--workers", 0, "--device", "cpu", "--save-every", 100]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "train_gpt.py", *arguments]
    metrics, memory = tmp_path / "run" / "metrics.jsonl", {}
    with subprocess.Popen([str(a) for a in command], env=environment, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(0.05)
            done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
            try:
                memory[done] = anonymous_bytes(process.pid)
            except (OSError, ValueError):
                break
    assert process.returncode == 0
    assert {2, 5} <= memory.keys() and memory[5] - memory[2] < 20e6
