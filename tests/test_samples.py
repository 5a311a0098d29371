"""Large runs: the same file whatever the processes and interruptions, balanced labels, nothing made twice."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sample
from llamagen_unitok.evaluation import samples
from llamagen_unitok.evaluation.presets import PRESETS
from llamagen_unitok.evaluation.provenance import model_record, read_record
from llamagen_unitok.evaluation.samples import LABEL_SCHEMES, SampleRun, run_record, run_samples, sample_record
from llamagen_unitok.pipeline import ImageGenerator
from llamagen_unitok.runtime.background import Background
from llamagen_unitok.runtime.distributed import World
from llamagen_unitok.sampling import SamplingConfig, engine_name
from tests.compiler import AUTO_ON_CPU
from tokenizer.images import Resize

ROOT = Path(sample.__file__).resolve().parent
ALONE = World(rank=0, size=1, device=torch.device("cpu"))
RUN = SampleRun(num_samples=11, batch_size=2)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(samples, "PART_PICTURES", 3)  # two batches of two in a part


@pytest.fixture
def job(bundle):
    """(generator, record) of a run of eleven samples in three parts."""
    generator = ImageGenerator.from_pretrained(bundle, device="cpu")
    return generator, sample_record(generator, model_record(bundle), RUN, SamplingConfig(seed=3))


def test_a_run_is_balanced_and_each_sample_follows_from_its_number(job, tmp_path):
    generator, record = job
    assert run_samples(generator, record, tmp_path / "a.npz", ALONE, progress=False) == 11
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
    with np.load(tmp_path / "a.npz") as made:
        assert made["arr_0"].shape == (11, 48, 48, 3) and made["arr_0"].dtype == np.uint8
        assert made["codes"].dtype == np.uint16
        assert np.bincount(made["label"]).tolist() == [3, 2, 2, 2, 2]
        longer = replace(RUN, num_samples=14)
        more = sample_record(
            generator, model_record(record_folder(generator, tmp_path)), longer, SamplingConfig(seed=3)
        )
        run_samples(generator, more, tmp_path / "b.npz", ALONE, progress=False)
        with np.load(tmp_path / "b.npz") as longer_made:
            for array in ("arr_0", "label", "codes"):
                assert np.array_equal(longer_made[array][:11], made[array])
        alone = generator.decode(torch.from_numpy(made["codes"][4:5].astype(np.int64)))[0]
        difference = np.abs(np.asarray(alone).astype(int) - made["arr_0"][4])
        assert difference.max() <= 1  # decoded alone and in a batch: rounding only
    assert read_record(tmp_path / "a.npz") == record


def record_folder(generator, tmp_path):
    return generator.save_pretrained(tmp_path / "bundle")


def test_an_interrupted_run_goes_on_and_makes_nothing_twice(job, tmp_path, monkeypatch):
    generator, record = job
    run_samples(generator, record, tmp_path / "whole.npz", ALONE, progress=False)
    calls = []
    real = samples.generate

    def counted(gpt, labels, **settings):
        calls.append(settings["indices"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(gpt, labels, **settings)

    monkeypatch.setattr(samples, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        run_samples(generator, record, tmp_path / "a.npz", ALONE, progress=False)
    assert not (tmp_path / "a.npz").exists()
    # the first part (two batches) is kept, the second was being made
    assert run_samples(generator, record, tmp_path / "a.npz", ALONE, progress=False) == 7
    assert calls[4:] == [[4, 5], [6, 7], [8, 9], [10, 10]]
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert run_samples(generator, record, tmp_path / "a.npz", ALONE, progress=False) == 0
    assert len(calls) == 8


def test_decoding_beside_generation_changes_no_byte(job, tmp_path, monkeypatch):
    generator, record = job
    run_samples(generator, record, tmp_path / "a.npz", ALONE, progress=False)
    monkeypatch.setattr(samples, "Background", lambda beside=True: Background())  # as on CUDA
    run_samples(generator, record, tmp_path / "b.npz", ALONE, progress=False)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_part_that_cannot_be_written_ends_the_run(job, tmp_path, monkeypatch):
    generator, record = job

    def full(path, arrays):
        raise OSError("No space left on device")

    monkeypatch.setattr(samples, "write_npz", full)
    with pytest.raises(OSError, match="No space left"):
        run_samples(generator, record, tmp_path / "a.npz", ALONE, progress=False)
    assert not (tmp_path / "a.npz").exists()


@pytest.mark.gpu
def test_cuda_decodes_on_a_second_stream_what_it_generated(bundle, tmp_path):
    generator = ImageGenerator.from_pretrained(bundle, device="cuda", dtype="fp32")
    record = sample_record(generator, model_record(bundle), RUN, SamplingConfig(seed=3))
    run_samples(generator, record, tmp_path / "a.npz", World(0, 1, torch.device("cuda")), progress=False)
    with np.load(tmp_path / "a.npz") as made:
        for pixels, codes in zip(made["arr_0"], made["codes"], strict=True):
            alone = generator.decode(torch.from_numpy(codes[None].astype(np.int64)))[0]
            assert np.abs(np.asarray(alone).astype(int) - pixels).max() <= 1


def test_parts_and_files_of_another_run_are_refused_and_kept(job, tmp_path):
    generator, record = job
    path = tmp_path / "a.npz"
    run_samples(generator, record, path, ALONE, progress=False)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"a\.npz holds other samples \(seed 3 there, 4 now\)"):
        run_samples(generator, {**record, "seed": 4}, path, ALONE, progress=False)
    assert path.read_bytes() == before
    np.savez(path, arr_0=np.zeros(3))
    with pytest.raises(ValueError, match="holds other samples"):
        run_samples(generator, record, path, ALONE, progress=False)


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_proposed_batch_size_is_that_of_the_run_that_goes_on(bundle, tmp_path, monkeypatch, capsys, interrupted):
    monkeypatch.setattr(sample, "propose_batch_size", lambda *_, **__: 4)
    path = tmp_path / "a.npz"
    arguments = ["--checkpoint", bundle, "--num-samples", 11, "--batch-size", "auto", "--device", "cpu", "--npz", path]
    if interrupted:
        with monkeypatch.context() as patch:
            patch.setattr(samples, "_merge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            assert sample.main([*map(str, arguments)]) == 130
    else:
        assert sample.main([*map(str, arguments)]) == 0
    # Another program took the memory meanwhile.
    monkeypatch.setattr(sample, "propose_batch_size", lambda *_, **__: 2)
    capsys.readouterr()
    assert sample.main([*map(str, arguments)]) == 0, capsys.readouterr().err
    assert "batch size 4\n" in capsys.readouterr().out
    assert read_record(path)["batch_size"] == 4


def test_a_run_records_the_engine_that_auto_stands_for(job):
    _, record = job
    assert record["engine"] == engine_name("auto", "cpu", large_run=True) == AUTO_ON_CPU
    assert engine_name("auto", "cuda", large_run=True) == "compiled"
    assert engine_name("auto", "cuda") == "graph"
    assert engine_name("graph", "cuda", large_run=True) == "graph"


def test_memory_does_not_grow_over_many_parts(job, tmp_path, monkeypatch):
    generator, record = job
    held, write = [], samples.write_npz

    def watched(path, arrays):
        held.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        write(path, arrays)

    monkeypatch.setattr(samples, "write_npz", watched)
    run_samples(generator, {**record, "num_samples": 256}, tmp_path / "a.npz", ALONE, progress=False)
    assert len(held) == 65  # sixty-four parts, and all of them as one
    assert max(held[32:]) - max(held[8:32]) < 8 << 20  # their pictures alone would be less, their graphs of work more


def test_a_full_disk_is_found_before_the_work(job, tmp_path, monkeypatch):
    generator, record = job
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(samples.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(samples, "generate", lambda *a, **k: pytest.fail("generated"))
    with pytest.raises(ValueError, match="too little room"):
        run_samples(generator, record, tmp_path / "a.npz", ALONE, progress=False)


@given(
    scheme=st.sampled_from(sorted(LABEL_SCHEMES)),
    count=st.integers(1, 400),
    classes=st.integers(1, 40),
    seed=st.integers(0, 2**64 - 1),
)
def test_labels_of_a_shorter_run_are_the_first_of_a_longer_one(scheme, count, classes, seed):
    ids = np.arange(classes) * 3
    labels = LABEL_SCHEMES[scheme](count, ids, seed)
    assert np.array_equal(LABEL_SCHEMES[scheme](count + 7, ids, seed)[:count], labels)
    assert np.isin(labels, ids).all()
    if scheme == "balanced":
        counts = np.bincount(labels // 3, minlength=classes)
        assert counts.max() - counts.min() <= 1


def test_random_labels_are_even_and_differ_between_seeds():
    labels = LABEL_SCHEMES["random"](20_000, np.arange(10), 5)
    assert np.abs(np.bincount(labels) - 2000).max() < 250  # six standard deviations
    assert (labels != LABEL_SCHEMES["random"](20_000, np.arange(10), 6)).mean() > 0.8


def torchrun(processes: int, arguments: list, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*launcher, ROOT / "sample.py", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_two_processes_write_the_file_that_one_writes(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(samples, "PART_PICTURES", 256)  # as the real command
    arguments = ["--checkpoint", bundle, "--num-samples", 530, "--batch-size", 50, "--device", "cpu", "--cfg", 1.5]
    arguments = [*map(str, arguments), "--npz", "a.npz"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    monkeypatch.setattr(sys, "argv", ["sample.py", *arguments])  # the command is a part of the record
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert sample.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    assert "530 pictures made" in capsys.readouterr().out
    done = torchrun(2, arguments, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert Path("../two/a.npz").read_bytes() == Path("a.npz").read_bytes()
    assert [p.name for p in (tmp_path / "two").iterdir()] == ["a.npz"]
    assert read_record(Path("a.npz"))["command"] == " ".join(["sample.py", *arguments])


def interrupted(generator, record, path, monkeypatch):
    """Stop a run when all of its parts are there, before they are merged."""
    with monkeypatch.context() as patch:
        patch.setattr(samples, "_merge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_samples(generator, record, path, ALONE, progress=False)
    return sorted(path.with_name(path.name + ".parts").glob("part-*"))


def test_parts_on_disk_count_as_room_that_a_resumed_run_has(job, tmp_path, monkeypatch):
    generator, record = job
    parts = interrupted(generator, record, tmp_path / "a.npz", monkeypatch)
    there = sum(part.stat().st_size for part in parts)
    free = type("Usage", (), {"free": int(1.1 * there)})  # enough for the merged file alone
    monkeypatch.setattr(samples.shutil, "disk_usage", lambda folder: free)
    assert run_samples(generator, record, tmp_path / "a.npz", ALONE, progress=False) == 0
    assert (tmp_path / "a.npz").exists()
    monkeypatch.setattr(samples, "generate", lambda *a, **k: pytest.fail("generated"))
    with pytest.raises(ValueError, match=r"needs 0\.2 MB more while it is written, and 0\.1 MB are free"):
        run_samples(generator, record, tmp_path / "b.npz", ALONE, progress=False)


def test_the_room_that_a_run_needs_is_that_of_its_resized_pictures(job, tmp_path, monkeypatch):
    generator, _ = job
    generator.resize = Resize(480)
    free = type("Usage", (), {"free": 10_000_000})
    monkeypatch.setattr(samples.shutil, "disk_usage", lambda folder: free)
    record = sample_record(generator, {}, RUN, SamplingConfig())
    with pytest.raises(ValueError, match=r"needs 15\.2 MB more"):  # 2 · 11 · 3 · 480²
        run_samples(generator, record, tmp_path / "a.npz", ALONE, progress=False)


def test_what_a_killed_merge_left_is_removed(job, tmp_path, monkeypatch):
    generator, record = job
    interrupted(generator, record, tmp_path / "a.npz", monkeypatch)
    (tmp_path / ".a.npz.123.tmp").write_bytes(b"gigabytes")
    (tmp_path / ".b.npz.123.tmp").write_bytes(b"of another run")
    run_samples(generator, record, tmp_path / "a.npz", ALONE, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.npz.123.tmp", "a.npz"]


@pytest.mark.parametrize("damage", ["empty", "cut short", "another shape"])
def test_a_part_that_a_crash_damaged_is_made_again(job, tmp_path, monkeypatch, damage):
    generator, record = job
    run_samples(generator, record, tmp_path / "whole.npz", ALONE, progress=False)
    part = interrupted(generator, record, tmp_path / "a.npz", monkeypatch)[1]
    if damage == "another shape":
        np.savez(part, arr_0=np.zeros((2, 48, 48, 3), np.uint8), codes=np.zeros((4, 9, 3), np.uint16))
    else:
        part.write_bytes(part.read_bytes()[: 0 if damage == "empty" else -100])
    assert run_samples(generator, record, tmp_path / "a.npz", ALONE, progress=False) == 4
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_a_part_whose_checksum_fails_is_named_and_made_again_by_the_next_start(job, tmp_path, monkeypatch):
    generator, record = job
    run_samples(generator, record, tmp_path / "whole.npz", ALONE, progress=False)
    part = interrupted(generator, record, tmp_path / "a.npz", monkeypatch)[1]
    data = bytearray(part.read_bytes())
    data[5000:6000] = bytes(1000)
    part.write_bytes(data)
    with pytest.raises(ValueError, match=r"part-00001.*it is removed: the same command makes it again"):
        run_samples(generator, record, tmp_path / "a.npz", ALONE, progress=False)
    assert run_samples(generator, record, tmp_path / "a.npz", ALONE, progress=False) == 4
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_parts_of_a_run_that_nobody_knows_are_named(job, tmp_path, monkeypatch):
    generator, record = job
    parts = interrupted(generator, record, tmp_path / "a.npz", monkeypatch)
    (parts[0].parent / samples.JOB_NAME).write_bytes(b"")
    with pytest.raises(ValueError, match=r"job\.json is damaged.*: remove .*a\.npz\.parts"):
        run_samples(generator, record, tmp_path / "a.npz", ALONE, progress=False)


def test_a_run_goes_on_on_its_own_kind_of_gpu_only(job, tmp_path, monkeypatch):
    """Whatever the command and the version of the code, which decide no pixel."""
    generator, record = job
    record = {**record, "gpu": "H100"}
    interrupted(generator, record, tmp_path / "a.npz", monkeypatch)
    with pytest.raises(ValueError, match=r"holds other samples \(gpu H100 there, A100 now\)"):
        run_samples(generator, {**record, "gpu": "A100"}, tmp_path / "a.npz", ALONE, progress=False)
    other = {**record, "command": "another", "code_version": "another"}
    assert run_samples(generator, other, tmp_path / "a.npz", ALONE, progress=False) == 0
    mixed = SimpleNamespace(collect=lambda _: ["H100", "A100"], share_outcome=lambda compute: compute(), rank=0, size=2)
    with pytest.raises(ValueError, match="the processes run on A100 and H100"):
        run_samples(generator, record, tmp_path / "b.npz", mixed, progress=False)


def test_a_record_names_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card of {device}")
    facts = {"dtype": torch.bfloat16, "engine": "graph"}
    record = run_record({}, RUN, SamplingConfig(), device=torch.device("cuda", 0), **facts)
    assert (record["gpu"], record["device"], record["dtype"]) == ("card of cuda:0", "cuda", "bfloat16")
    assert "gpu" not in run_record({}, RUN, SamplingConfig(), device=torch.device("cpu"), **facts)


def test_a_preset_fixes_its_settings(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "unitok-cfgfree", replace(PRESETS["unitok-cfgfree"], num_samples=6))
    path = tmp_path / "a.npz"
    arguments = ["--checkpoint", str(bundle), "--preset", "unitok-cfgfree", "--npz", str(path), "--device", "cpu"]
    assert sample.main([*arguments, "--seed", "5"]) == 0
    record = read_record(path)
    wanted = {"temperature": 0.9, "cfg_scale": 1.0, "labels": "random", "num_samples": 6, "seed": 5, "top_k": 0}
    wanted["preset"] = "unitok-cfgfree"
    assert {name: record[name] for name in wanted} == wanted
    capsys.readouterr()
    assert sample.main([*arguments, "--temperature=0.8"]) == 2
    assert "fixes --temperature at 0.9" in capsys.readouterr().err
    assert sample.main([*arguments, "--preset", "unknown"]) == 2
    assert "choose one of unitok-cfgfree" in capsys.readouterr().err
    assert sample.main(["--preset", "unitok-cfgfree", "--npz", str(path)]) == 2
    assert "--preset unitok-cfgfree needs --checkpoint" in capsys.readouterr().err


def test_a_figure_published_without_guidance_has_a_preset():
    assert PRESETS["llamagen-xxl-384-cfgfree"].sampling.cfg_scale == 1
    assert PRESETS["llamagen-xxl-384-cfgfree"].figures["FID"] > PRESETS["llamagen-xxl-384"].figures["FID"]
    assert "llamagen-b-256-cfgfree" not in PRESETS  # nobody published one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-samples", "5"], "give --npz"),
        (["--num-samples", "0", "--npz", "a.npz"], "--num-samples must be"),
        (["--num-samples", "5", "--npz", "a.npz", "--batch-size", "0"], "--batch-size must be"),
        (["--num-samples", "5", "--npz", "a.npz", "--out", "a.png"], "leave out --out"),
        (["--num-samples", "5", "--npz", "gone/a.npz"], "--npz gone/a.npz cannot be written"),
        (["--num-samples", "5", "--npz", "a.npz", "--class", "9"], "no class 9"),
        (["--num-samples", "5", "--npz", "a.npz", "--num", "4"], "leave one of them out"),
        (["--class", "dog", "--npz", "a.npz", "--labels", "random"], "--labels is for a large run"),
    ],
)
def test_wrong_large_runs_end_in_one_line(bundle, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert sample.main([*arguments, "--checkpoint", str(bundle), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and message in err
    assert list(tmp_path.iterdir()) == []
