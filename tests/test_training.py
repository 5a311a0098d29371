"""Training: resumed runs equal uninterrupted ones, optimizers cover every parameter, processes average gradients."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import extract_codes
import train_gpt
import train_tokenizer
from llamagen_unitok import GPT, GPTConfig
from llamagen_unitok.runtime.checkpoint import complete_checkpoints
from llamagen_unitok.runtime.distributed import World
from llamagen_unitok.runtime.optim import EMA, LR_SCHEDULES, decay_groups, lr_factor
from llamagen_unitok.training.data import CodeShards
from llamagen_unitok.training.images import VIEWS, PictureViews
from llamagen_unitok.training.sources import SourceOptions, open_source
from tokenizer import PRESETS, UniTok
from tokenizer.images import to_unit

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
LOOP = [
    "--batch-size",
    "4",
    "--warmup-steps",
    "1",
    "--workers",
    "0",
    "--lr",
    "1e-3",
    "--save-every",
    "2",
    "--keep",
    "9",
]
SMALL_GPT = ["--layers", "2", "--heads", "2", "--width", "32", "--depth-layers", "1", "--ffn-multiple", "16"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """3 classes of 4 pictures each, 40×36 pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for label in range(3):
        (folder / f"class {label}").mkdir()
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, (36, 40, 3), dtype=np.uint8)).save(folder / f"class {label}/{i}.png")
    return folder


@pytest.fixture(scope="module")
def tiny_preset():
    """A 32-pixel tokenizer among the presets, for the scripts to name."""
    PRESETS["vitamin_test"] = replace(
        PRESETS["vitamin_tiny"], img_size=32, stem_width=8, conv_widths=(8, 8), conv_depths=(1, 1), width=32, depth=1,
        heads=2, num_codebooks=2, code_width=4, codebook_size=16, embed_dim=8,
    )  # fmt: skip
    yield "vitamin_test"
    del PRESETS["vitamin_test"]


@pytest.fixture(scope="module")
def tokenizer_folder(tiny_preset, tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = UniTok(PRESETS[tiny_preset])
    tokenizer.init_weights()
    return tokenizer.save_pretrained(tmp_path_factory.mktemp("tokenizer") / "tokenizer")


@pytest.fixture(scope="module")
def codes(tokenizer_folder, pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("codes") / "codes"
    arguments = ["--images", pictures, "--tokenizer", tokenizer_folder, "--out", out, "--shard-size", 5, "--workers", 1]
    assert extract_codes.main([str(a) for a in [*arguments, "--ten-crop"]]) == 0
    return out


def test_extracted_codes_are_the_tokenizers(codes, tokenizer_folder, pictures):
    shards = CodeShards(codes)
    shards.verify()
    assert len(shards) == 12 and len(shards.meta.views) == 10 and shards.meta.class_names[1] == "class 1"
    source = open_source(pictures, SourceOptions(), World(0, 1, torch.device("cpu")))
    views, label = PictureViews(source, 32, VIEWS["ten-crop"]([1.1]))[7], source.labels[7]
    expected = UniTok.from_pretrained(tokenizer_folder).encode(to_unit(views))
    for view in range(10):
        stored_label, stored = shards[7, view]
        assert stored_label == label == 1 and np.array_equal(stored, expected[view].numpy())


def test_extraction_goes_on_where_it_stopped_and_refuses_another_job(
    codes, tokenizer_folder, pictures, tmp_path, capsys
):
    again = tmp_path / "codes"
    shutil.copytree(codes, again)
    (again / "meta.json").unlink()
    missing = again / "shard-00001-of-00003.safetensors"
    missing.unlink()
    kept = (again / "shard-00000-of-00003.safetensors").stat().st_mtime_ns
    arguments = ["--images", pictures, "--tokenizer", tokenizer_folder, "--out", again, "--workers", 1, "--shard-size"]
    assert extract_codes.main([str(a) for a in [*arguments, 5, "--ten-crop"]]) == 0
    assert missing.read_bytes() == (codes / missing.name).read_bytes()
    assert (again / "shard-00000-of-00003.safetensors").stat().st_mtime_ns == kept
    assert extract_codes.main([str(a) for a in [*arguments, 6, "--ten-crop"]]) == 2
    assert "another job (other shard_size)" in capsys.readouterr().err


def train_generator(codes, out, *extra) -> dict:
    arguments = ["--codes", codes, "--out", out, *SMALL_GPT, *LOOP, "--ema", "0.9", *extra]
    assert train_gpt.main([str(a) for a in arguments]) == 0
    return load_file(out / "generator" / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_resumed_generator_equals_uninterrupted_bit_for_bit(codes, tmp_path):
    whole = train_generator(codes, tmp_path / "whole", "--steps", 6)
    cut = tmp_path / "cut"
    train_generator(codes, cut, "--steps", 6)
    # as after a kill between steps 4 and 6: the newest checkpoint is gone, and a half-written one lies about
    shutil.rmtree(cut / "generator")
    newest = complete_checkpoints(cut)[-1]
    newest.rename(newest.with_name(f".{newest.name}.tmp"))
    half_written = [cut / ".generator.0badcafe.tmp", cut / "checkpoints" / ".step-00000005.tmp"]
    for left in half_written:
        left.mkdir()
    assert same(whole, train_generator(codes, cut, "--steps", 6))
    assert not any(left.exists() for left in half_written)
    assert (cut / "checkpoints" / "latest").resolve().name == "step-00000006"
    steps = [json.loads(line)["step"] for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_resumed_tokenizer_equals_uninterrupted_bit_for_bit(tiny_preset, pictures, tmp_path):
    def run(out: Path) -> dict:
        arguments = ["--images", pictures, "--preset", tiny_preset, "--out", out, *LOOP, "--ema", "0.9", "--steps", 4,
                     "--crop-scale", "0.5", "--flip", "--restart-every", 1]  # fmt: skip
        assert train_tokenizer.main([str(a) for a in arguments]) == 0
        return load_file(out / "tokenizer" / "model.safetensors")

    whole = run(tmp_path / "whole")
    cut = tmp_path / "cut"
    run(cut)
    newest = complete_checkpoints(cut)[-1]
    newest.rename(newest.with_name(f".{newest.name}.tmp"))
    assert same(whole, run(cut))


def test_two_processes_train_a_tokenizer_with_an_image_head(tiny_preset, pictures, tmp_path):
    # A process of its own knows only the presets of the code, so the small one is put there by a file that it starts.
    start = tmp_path / "start.py"
    start.write_text(
        "import sys\nfrom dataclasses import replace\nimport train_tokenizer\nfrom tokenizer import PRESETS\n"
        "PRESETS['small'] = replace(PRESETS['vitamin_base'], img_size=32, stem_width=8, conv_widths=(8, 8), "
        "conv_depths=(1, 1), width=32, depth=1, heads=2, num_codebooks=2, code_width=4, codebook_size=16)\n"
        "sys.exit(train_tokenizer.main())\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["--images", pictures, "--preset", "small", "--out", tmp_path / "run", *LOOP, "--steps", 3]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([str(a) for a in [*torchrun, start, *arguments]], env=environment, check=True, timeout=240)
    assert "projection.weight" in load_file(tmp_path / "run" / "tokenizer" / "model.safetensors")


def test_a_broken_picture_ends_training_in_one_line_that_names_it(tiny_preset, pictures, tmp_path, capsys):
    images = tmp_path / "pictures"
    shutil.copytree(pictures, images)
    broken = images / "class 1" / "2.png"
    broken.write_bytes(broken.read_bytes()[:300])
    arguments = ["--images", images, "--preset", tiny_preset, "--out", tmp_path / "run", *LOOP, "--steps", 4]
    workers = arguments.index("--workers") + 1
    arguments[workers] = "1"
    before = set(multiprocessing.active_children())
    assert train_tokenizer.main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(broken) in error and "Traceback" not in error and len(error) < 300
    assert set(multiprocessing.active_children()) <= before  # one that is left would keep the command from ending


def test_going_back_to_an_earlier_checkpoint_needs_the_later_ones_out_of_the_way(codes, tmp_path, capsys):
    out = tmp_path / "run"
    whole = train_generator(codes, out, "--steps", 6)
    earlier = out / "checkpoints" / "step-00000002"
    arguments = ["--codes", codes, "--out", out, *SMALL_GPT, *LOOP, "--ema", "0.9", "--steps", 6, "--resume", earlier]
    assert train_gpt.main([str(a) for a in arguments]) == 2
    assert "holds checkpoints after step-00000002 (step-00000004, step-00000006)" in capsys.readouterr().err
    for step in (4, 6):
        shutil.rmtree(out / "checkpoints" / f"step-{step:08d}")
    assert same(whole, train_generator(codes, out, "--steps", 6, "--resume", earlier))
    assert same(whole, train_generator(codes, tmp_path / "other", "--steps", 6, "--resume", earlier))


def test_a_killed_run_resumes_to_the_same_weights(codes, tmp_path):
    whole = train_generator(codes, tmp_path / "whole", "--steps", 120)
    out = tmp_path / "killed"
    arguments = ["--codes", codes, "--out", out, *SMALL_GPT, *LOOP, "--ema", "0.9", "--steps", 120]
    command = [sys.executable, ROOT / "train_gpt.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for sent, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        before = len(complete_checkpoints(out))
        process = subprocess.Popen([str(a) for a in command], env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and len(complete_checkpoints(out)) <= before and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(sent)
        assert process.wait(60) == code
        assert 0 < len(complete_checkpoints(out))
    assert same(whole, train_generator(codes, out, "--steps", 120))


def test_a_run_can_start_from_a_trained_generator(codes, tmp_path, capsys):
    trained = train_generator(codes, tmp_path / "first", "--steps", 2)
    start = ["--steps", 2, "--lr", "1e-12", "--weight-decay", 0, "--init"]
    again = train_generator(codes, tmp_path / "second", *start, tmp_path / "first" / "generator")
    for name, tensor in trained.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-6)
    arguments = ["--codes", codes, "--out", tmp_path / "third", *SMALL_GPT, *LOOP, *start, tmp_path / "first/generator"]
    assert train_gpt.main([str(a) for a in [*arguments, "--width", 64]]) == 2
    assert "does not fit GPT" in capsys.readouterr().err


def test_a_run_is_not_continued_with_other_settings(codes, tmp_path, capsys):
    train_generator(codes, tmp_path / "run", "--steps", 2)
    arguments = ["--codes", codes, "--out", tmp_path / "run", *SMALL_GPT, *LOOP, "--ema", "0.9", "--steps", 2]
    assert train_gpt.main([str(a) for a in [*arguments, "--class-dropout", 0]]) == 2
    assert "other settings" in capsys.readouterr().err
    assert train_gpt.main([str(a) for a in [*arguments, "--resume", "none"]]) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "huge"], "unknown generator size 'huge'"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--lr-schedule", "liner"], "unknown learning-rate schedule 'liner'"),
        (["--warmup-steps", "9999999"], "--warmup-steps"),
        (["--class-dropout", "1.5"], "--class-dropout must lie in [0, 1)"),
        (["--precision", "fp8"], "--precision must be one of bf16, tf32, fp32"),
        (["--codes", "/nowhere"], "/nowhere has no meta.json"),
        (["--device", "warp"], "--device warp is not a device"),
        (["--device", "meta"], "--device meta is not a device that this runs on"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--workers", "-1"], "--workers must be at least 0"),
        (["--warmup-steps", "-5"], "--warmup-steps must be at least 0"),
        (["--grad-clip", "nan"], "--grad-clip must be 0 or above"),
        (["--beta1", "2"], "--beta1 must lie in [0, 1)"),
        (["--lr", "inf"], "--lr must be above 0"),
    ],
)
def test_wrong_training_flags_are_one_clear_line(codes, tmp_path, capsys, flags, message):
    out = tmp_path / "run"
    assert train_gpt.main(["--codes", str(codes), "--out", str(out), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--l1", "nan"], "--l1 must be 0 or above"),
        (["--l2", "-1"], "--l2 must be 0 or above"),
        (["--l1", "0", "--l2", "0", "--vq", "0"], "all weights of the loss are 0"),
        (["--restart-every", "-1"], "--restart-every must be 0 or above"),
        (["--restart-until", "2"], "--restart-until must lie in [0, 1]"),
    ],
)
def test_wrong_tokenizer_flags_are_one_clear_line(pictures, tiny_preset, tmp_path, capsys, flags, message):
    out = tmp_path / "run"
    assert train_tokenizer.main(["--images", str(pictures), "--preset", tiny_preset, "--out", str(out), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()


def test_a_diverging_run_stops_and_names_the_step(codes, tmp_path, capsys):
    arguments = ["--codes", codes, "--out", tmp_path / "run", *SMALL_GPT, *LOOP, "--steps", 9, "--precision", "fp32"]
    assert train_gpt.main([str(a) for a in [*arguments, "--lr", "1e30", "--grad-clip", 0]]) == 2
    assert "is not finite at step" in capsys.readouterr().err


def test_optimizer_covers_every_parameter_once_and_spares_vectors_and_codebooks(tiny_preset):
    for module in (UniTok(PRESETS[tiny_preset]), GPT(GPTConfig(2, 2, 32, num_positions=16))):
        groups = decay_groups(module, 0.05)
        counted = [p for group in groups for p in group["params"]]
        assert sorted(map(id, counted)) == sorted(map(id, module.parameters()))
        assert all(p.ndim >= 2 for p in groups[0]["params"]) and groups[1]["weight_decay"] == 0
        names = {id(p): name for name, p in module.named_parameters()}
        assert not any(".codebook.weight" in names[id(p)] for p in groups[0]["params"])


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
def test_learning_rate_warms_up_and_never_exceeds_the_peak(schedule):
    factors = [lr_factor(s, steps=100, warmup_steps=10, schedule=schedule) for s in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1 and max(factors) == 1 and min(factors) > 0
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_average_follows_its_definition():
    module = torch.nn.Linear(2, 1)
    ema = EMA(module, 0.5)
    expected = module.weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            module.weight.add_(1.0)
        ema.update(module, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight
    torch.testing.assert_close(ema.state["weight"], expected.detach())


TWO_PROCESSES = """
import os, sys, torch
from llamagen_unitok import GPT, GPTConfig
from llamagen_unitok.runtime.distributed import processes
from llamagen_unitok.training.generator import GeneratorObjective
torch.set_num_threads(1)
torch.manual_seed(0)
gpt = GPT(GPTConfig(2, 2, 32, num_classes=5, num_positions=4, num_codebooks=2, codebook_size=8, depth_layers=1)).eval()
torch.nn.init.normal_(gpt.output.linear_head.weight)
objective = GeneratorObjective(gpt, 0.0)
labels, codes = torch.arange(4), torch.randint(0, 8, (4, 4, 2), generator=torch.Generator().manual_seed(1))


def run(world):
    share = world.share(4)
    mine = slice(world.rank * share, (world.rank + 1) * share)
    wrapped = world.wrap(objective)
    loss, _ = wrapped(labels[mine], codes[mine])
    loss.backward()
    if world.is_main:
        torch.save([p.grad for p in gpt.parameters()], sys.argv[1])
    assert world.mean(torch.tensor(float(world.rank))).item() == (world.size - 1) / 2


with processes("cpu") as world:
    run(world)
"""


def test_two_processes_have_the_gradients_of_one(tmp_path):
    script = tmp_path / "gradients.py"
    script.write_text(TWO_PROCESSES)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, str(script), str(tmp_path / "2.pt")], env=environment, check=True, timeout=240)
    subprocess.run([sys.executable, str(script), str(tmp_path / "1.pt")], env=environment, check=True, timeout=240)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        # Rounding follows the largest terms of the sums, not each element: 1e-5 of a tensor's largest gradient.
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.slow  # tests/test_parallel.py compares every step; this one goes through the script
def test_training_with_two_processes_ends_with_one_model(codes, tmp_path):
    arguments = ["--codes", codes, *SMALL_GPT, *LOOP, "--steps", 3, "--precision", "fp32", "--dropout", 0]
    arguments += ["--class-dropout", 0]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, ROOT / "train_gpt.py", *arguments, "--out", tmp_path / "two", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([str(a) for a in command], env=environment, check=True, timeout=240)
    assert train_gpt.main([str(a) for a in [*arguments, "--out", tmp_path / "one"]]) == 0
    one, two = (load_file(tmp_path / n / "generator" / "model.safetensors") for n in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


def test_one_process_reduces_to_itself():
    world = World(0, 1, torch.device("cpu"))
    value = torch.tensor([1.0, 2.0])
    assert torch.equal(world.mean(value), value) and world.any(True) and not world.any(False)


def test_frozen_encoder_keeps_all_codes(tokenizer_folder, tiny_preset, pictures, tmp_path, capsys):
    arguments = [*map(str, ["--images", pictures, "--preset", tiny_preset, "--steps", 3, *LOOP]), "--freeze-encoder"]
    assert train_tokenizer.main([*arguments, "--out", str(tmp_path), "--init", str(tokenizer_folder)]) == 0
    before, after = UniTok.from_pretrained(tokenizer_folder), UniTok.from_pretrained(tmp_path / "tokenizer")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(before.encode(images), after.encode(images))
    assert not torch.equal(before.reconstruct(images), after.reconstruct(images))
    capsys.readouterr()
    assert train_tokenizer.main([*arguments, "--out", str(tmp_path / "b")]) == 2
    assert "--freeze-encoder needs --init" in capsys.readouterr().err
