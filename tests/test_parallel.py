"""Training on several processes: the losses of one process, whatever is sharded, accumulated or recomputed."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llamagen_unitok import GPT
from llamagen_unitok.runtime.agreement import Agreement
from llamagen_unitok.runtime.checkpoint import Checkpoints, complete_checkpoints, read_tensors
from llamagen_unitok.runtime.distributed import World, pick_device, processes
from llamagen_unitok.runtime.parallel import ParallelModule, pick_parallel, wrap_blocks
from llamagen_unitok.training.data import CodeShards, TrainingCodes
from llamagen_unitok.training.generator import GeneratorObjective, GeneratorTraining, train_generator
from llamagen_unitok.training.loop import LoopConfig, forward_backward, sample_draws, train
from tests.random_codes import write_codes
from tests.tiny_generator import random_batch, tiny_gpt

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
ALONE = World(0, 1, torch.device("cpu"))
SMALL = {
    "layers": 2, "heads": 2, "width": 32, "depth_layers": 1, "ffn_multiple": 16, "dropout": 0.0, "class_dropout": 0.3,
}  # fmt: skip
LOOP = {
    "steps": 20, "batch_size": 8, "warmup_steps": 2, "workers": 0, "lr": 1e-3, "log_every": 1, "save_every": 10,
    "keep": 9, "precision": "fp32", "ema": 0.9,
}  # fmt: skip
BF16 = "fsdp, bf16"
# What two processes run, one after the other: name → changes to LOOP.
RUNS = {
    "ddp": {},
    "ddp, 2 parts": {"accumulate": 2},
    "fsdp": {"parallel": "fsdp"},
    "fsdp, 4 parts": {"parallel": "fsdp", "accumulate": 4, "checkpoint_activations": "full"},
    "hsdp": {"parallel": "hsdp", "shard_size": 1, "async_save": False},
    "fsdp again": {"parallel": "fsdp"},
    "one, then fsdp": {"parallel": "fsdp"},
    BF16: {"parallel": "fsdp", "precision": "bf16", "checkpoint_activations": "selective"},
}


def run(folder: Path, name: str, world: World, **changes) -> None:
    settings, loop = GeneratorTraining(codes=folder / "codes", **SMALL), LoopConfig(**{**LOOP, **changes})
    train_generator(settings, loop, out=folder / name, resume="auto", world=world)


def keep_until_step_10(source: Path, target: Path) -> None:
    """A run as a kill between steps 10 and 20 leaves it."""
    shutil.copytree(source, target, symlinks=True)
    shutil.rmtree(target / "checkpoints" / "step-00000020")


def two_processes() -> None:
    """The body of the two processes that the fixture below starts."""
    from llamagen_unitok.runtime.distributed import processes

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with processes("cpu") as world:
        for name, changes in RUNS.items():
            if name == "fsdp again" and world.is_main:
                keep_until_step_10(folder / "fsdp", folder / name)
            world.barrier()
            run(folder, name, world, **changes)
        outcome = {"spoiled": spoiled_run(folder, world), "full disk": full_disk(folder / "full disk", world)}
        (folder / f"outcome-{world.rank}.json").write_text(json.dumps(outcome))


class Spoiled(GeneratorObjective):
    """Its loss is not a number at step 3 on rank 1."""

    def forward(self, *batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, scalars = super().forward(*batch)
        spoiled = int(os.environ["RANK"]) == 1 and self.done == 3
        return loss * (float("nan") if spoiled else 1.0), scalars

    done = 0

    def after_step(self, step: int, world: World) -> None:
        self.done = step + 1


def spoiled_run(folder: Path, world: World) -> dict:
    """The error, and whether the weights are those after step 3."""
    shards = CodeShards(folder / "codes")
    torch.manual_seed(0)
    gpt = GPT(GeneratorTraining(codes=folder / "codes", **SMALL).architecture(shards))
    config = LoopConfig(**{**LOOP, "save_every": 3, "keep": 1})
    error = ""
    try:
        train(
            Spoiled(gpt, 0.3), TrainingCodes(shards, 0), config, out=folder / "spoiled", resume="auto", world=world,
            meta={}, on_save=lambda state, step: None,
        )  # fmt: skip
    except FloatingPointError as caught:
        error = str(caught)
    world.barrier()  # the main process gives the checkpoint its name
    saved = read_tensors(folder / "spoiled" / "checkpoints" / "step-00000003", "model")
    unspoiled = all(torch.equal(saved[f"gpt.{name}"], tensor) for name, tensor in gpt.state_dict().items())
    return {"error": error, "unspoiled": unspoiled}


def full_disk(out: Path, world: World) -> dict:
    """What a save is that only rank 1 cannot write, and whether the one after it is complete."""
    checkpoints = Checkpoints(out, {}, world, keep=1)
    state = {"model": {f"w{i}": torch.ones(50_000) for i in range(4)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    failures = []
    for step in (1, 2, 3):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if step == 2 and world.rank == 1 else soft, hard))
        checkpoints.save(step, state)
        checkpoints.settle()
        world.barrier()
        failures.append([checkpoints.failure is not None, *(path.name for path in complete_checkpoints(out))])
        world.barrier()
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.close()
    return {"failures": failures}


def torchrun(script: Path, *arguments: object, processes: int = 2) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, script, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, launcher)], env=environment, timeout=500, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run for each of RUNS by two processes, and "one" by one process in two parts."""
    folder = tmp_path_factory.mktemp("runs")
    write_codes(folder / "codes")
    run(folder, "one", ALONE, accumulate=2)
    keep_until_step_10(folder / "one", folder / "one, then fsdp")
    script = folder / "script.py"
    script.write_text("from tests.test_parallel import two_processes\ntwo_processes()\n")
    result = torchrun(script, folder)
    assert result.returncode == 0, result.stderr[-3000:]
    (folder / "stderr.txt").write_text(result.stderr)
    return folder


def losses(run_folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    return [line["loss"] for line in lines]


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(run_folder / "generator" / "model.safetensors")


@pytest.mark.parametrize("name", [name for name in RUNS if name != BF16])
def test_two_processes_have_the_losses_of_one_process(runs, name):
    one = losses(runs / "one")
    assert one == pytest.approx(losses(runs / name), rel=1e-5)
    assert max(one) - min(one) > 1e-3  # training moved, so equality says something
    for key, tensor in weights(runs / "one").items():
        torch.testing.assert_close(tensor, weights(runs / name)[key], rtol=1e-3, atol=1e-5)


def test_a_sharded_run_resumes_bit_for_bit(runs):
    whole, resumed = weights(runs / "fsdp"), weights(runs / "fsdp again")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert losses(runs / "fsdp") == losses(runs / "fsdp again")


@pytest.mark.parametrize("source", ["fsdp", "ddp"])
def test_a_run_of_two_processes_is_continued_by_one(runs, tmp_path, source):
    keep_until_step_10(runs / source, tmp_path / "run")
    (tmp_path / "codes").symlink_to(runs / "codes")
    run(tmp_path, "run", ALONE, accumulate=4)
    assert losses(tmp_path / "run") == pytest.approx(losses(runs / "one"), rel=1e-5)


def test_all_processes_stop_at_a_spoiled_loss_and_name_its_step_and_rank(runs):
    for rank in range(2):
        outcome = json.loads((runs / f"outcome-{rank}.json").read_text())["spoiled"]
        assert "loss nan is not finite at step 3 on rank 1:" in outcome["error"]
        assert outcome["unspoiled"]


def test_a_full_disk_under_one_process_fails_the_save_for_all_and_spares_the_one_before(runs):
    for rank in range(2):
        outcome = json.loads((runs / f"outcome-{rank}.json").read_text())["full disk"]
        assert outcome["failures"] == [[False, "step-00000001"], [True, "step-00000001"], [False, "step-00000003"]]


def test_sharded_bf16_keeps_float32_weights_and_stays_near_float32(runs):
    exact, rounded = losses(runs / "one"), losses(runs / BF16)
    assert rounded == pytest.approx(exact, rel=1e-2) and rounded != pytest.approx(exact, rel=1e-5)
    # steps of the size of lr vanish in bf16 weights of 0.02: none of these is a bf16 number by chance
    table = weights(runs / BF16)["layers.0.attention.wqkv.weight"]
    assert table.dtype == torch.float32 and not torch.equal(table, table.bfloat16().float())


@pytest.mark.slow
def test_hybrid_sharding_over_four_processes_has_the_losses_of_one(runs, tmp_path):
    (tmp_path / "codes").symlink_to(runs / "codes")
    script = tmp_path / "script.py"
    script.write_text("from tests.test_parallel import four_processes\nfour_processes()\n")
    result = torchrun(script, tmp_path, processes=4)
    assert result.returncode == 0, result.stderr[-3000:]
    assert losses(tmp_path / "hsdp") == pytest.approx(losses(runs / "one"), rel=1e-5)


def four_processes() -> None:
    """Two copies, each over two processes."""
    from llamagen_unitok.runtime.distributed import processes

    torch.set_num_threads(1)
    with processes("cpu") as world:
        run(Path(sys.argv[1]), "hsdp", world, parallel="hsdp", shard_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_compiled_blocks_have_the_losses_of_plain_ones(runs, tmp_path, recompute):
    (tmp_path / "codes").symlink_to(runs / "codes")
    run(tmp_path, "compiled", ALONE, compile="on", checkpoint_activations=recompute)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(runs / "one"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_all_trunk_blocks_share_one_compilation_and_all_depth_blocks_another(monkeypatch, recompute):
    compiled, compile_plainly = [], torch.compile

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_plainly(f, backend=backend, **options))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gpt = tiny_gpt(layers=10, depth_layers=10).train()  # more than dynamo would compile one by one
    wrap_blocks(GeneratorObjective(gpt, 0.0).blocks(), recompute, compiled=True)
    for _ in range(2):
        gpt.loss(*random_batch(gpt, 4)).backward()
    assert len(compiled) == 2 and not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("accumulate", [2, 3])
def test_gradients_of_parts_are_those_of_the_whole(accumulate):
    gradients = []
    for parts in (1, accumulate):
        gpt = tiny_gpt(token_dropout=0, residual_dropout=0, ffn_dropout=0).train()
        objective = GeneratorObjective(gpt, 0.5)
        model = ParallelModule(objective, ALONE, blocks=objective.blocks())
        batch = (*random_batch(gpt, 6), torch.linspace(0, 0.99, 6))
        loss, scalars = forward_backward(model, batch, parts)
        gradients.append([loss, scalars["loss"], *(p.grad for p in gpt.parameters())])
    for whole, summed in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, summed, rtol=1e-5, atol=1e-7)


def test_losses_at_a_share_of_the_positions_do_not_depend_on_the_parts(tmp_path):
    write_codes(tmp_path / "codes")
    settings = GeneratorTraining(codes=tmp_path / "codes", **SMALL, head_share=0.25)
    for parts in (1, 4):
        loop = LoopConfig(**{**LOOP, "accumulate": parts})
        train_generator(settings, loop, out=tmp_path / str(parts), resume="auto", world=ALONE)
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "4"), rel=1e-5)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_change_no_gradient(recompute):
    gradients = []
    for mode in ("none", recompute):
        gpt = tiny_gpt().train()
        wrap_blocks(GeneratorObjective(gpt, 0.0).blocks(), mode, compiled=False)
        torch.manual_seed(0)  # dropout is on
        gpt.loss(*random_batch(gpt, 4)).backward()
        gradients.append([p.grad for p in gpt.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert gpt.state_dict().keys() == tiny_gpt().state_dict().keys()


def test_label_dropout_follows_the_place_in_the_global_batch():
    whole = sample_draws(3, 7, 12, ALONE)
    parts = [sample_draws(3, 7, 12, World(rank, 3, torch.device("cpu"))) for rank in range(3)]
    assert torch.equal(whole, torch.cat(parts)) and not torch.equal(whole, sample_draws(3, 8, 12, ALONE))
    many = torch.cat([sample_draws(0, step, 100, ALONE) for step in range(100)])
    assert 0 <= many.min() and many.max() < 1
    # 10,000 draws: the share below 0.1 lies within five standard deviations, odds of failure under one in a million
    assert (many < 0.1).float().mean().item() == pytest.approx(0.1, abs=0.015)
    gpt = tiny_gpt(token_dropout=0, residual_dropout=0, ffn_dropout=0).train()
    labels, codes = random_batch(gpt, 4)
    dropped = torch.where(torch.tensor([True, False, True, False]), 5, labels)
    loss, _ = GeneratorObjective(gpt, 0.5)(labels, codes, torch.tensor([0.1, 0.5, 0.499, 0.9]))
    assert torch.equal(loss, gpt.loss(dropped, codes))


@pytest.mark.parametrize("lag", [False, True])
@pytest.mark.parametrize("spoiled", ["loss", "norm"])
def test_a_number_that_is_not_finite_never_reaches_the_weights(lag, spoiled):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)  # the only kind that skips by itself
    agreement = Agreement(ALONE, lag=lag)
    good, bad = torch.tensor(1.0), torch.tensor(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite at step 2 on rank 0"):
        for step in range(5):
            values = {"loss": good, "norm": good} | ({spoiled: bad} if step == 2 else {})
            weight.grad = torch.full((3,), float("nan") if step == 2 else 1.0)
            optimizer.found_inf = agreement.exchange(step, **values, stop=False)
            optimizer.step()
            before_next = weight.detach().clone()
            assert torch.isfinite(weight).all()
            assert optimizer.state[weight]["step"] == min(step + 1, 2)
    assert step == (3 if lag else 2) and torch.equal(before_next, weight)


def test_a_wish_to_stop_is_told_one_step_late_at_most():
    for lag in (False, True):
        agreement, one = Agreement(ALONE, lag=lag), torch.tensor(1.0)
        agreement.exchange(0, one, one, stop=True)
        assert agreement.stop is not lag
        agreement.settle()
        assert agreement.stop


def test_flags_that_cannot_be_are_one_clear_line(tmp_path):
    two = World(0, 2, torch.device("cpu"))
    with pytest.raises(ValueError, match="--parallel fsdp: this model has no blocks to shard"):
        pick_parallel("fsdp", torch.nn.Linear(1, 1), two, can_shard=False)
    assert pick_parallel("auto", torch.nn.Linear(1, 1), two, can_shard=True) == "ddp"
    write_codes(tmp_path / "codes")
    with pytest.raises(ValueError, match=r"--accumulate 3 does not divide the 8 pictures"):
        run(tmp_path, "run", ALONE, accumulate=3)
    assert not (tmp_path / "run").exists()
    for changes in ({"parallel": "dpp"}, {"compile": "yes"}, {"checkpoint_activations": "some"}, {"keep_every": -1}):
        with pytest.raises(ValueError, match=f"--{next(iter(changes)).replace('_', '-')} must be"):
            LoopConfig(**changes)


def test_processes_wait_for_each_other_for_hours(monkeypatch):
    asked = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda _kind, timeout: asked.update(timeout=timeout))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with processes("cpu"):
        assert asked["timeout"].total_seconds() >= 2 * 3600


def test_more_processes_than_gpus_are_one_clear_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"needs cuda:2, but this machine has 2 CUDA devices") as error:
        pick_device("auto")
    assert "--nproc-per-node" in str(error.value) and "\n" not in str(error.value)


def test_too_little_memory_is_one_line_that_names_what_saves_some(tmp_path, monkeypatch):
    def full(self, *_batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has …")

    write_codes(tmp_path / "codes")
    monkeypatch.setattr(ParallelModule, "__call__", full)
    with pytest.raises(ValueError, match="out of memory training 4 pictures at once") as error:
        run(tmp_path, "run", ALONE, accumulate=2)
    assert all(f in str(error.value) for f in ("--accumulate", "--checkpoint-activations", "--batch-size"))
    assert "\n" not in str(error.value)


def test_sharding_that_does_nothing_is_told(tmp_path, capsys):
    write_codes(tmp_path / "codes")
    run(tmp_path, "run", ALONE, parallel="hsdp", steps=3)
    assert "--parallel hsdp: one process holds the whole model" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--shard-size 2 is for --parallel hsdp, not fsdp"):
        LoopConfig(parallel="fsdp", shard_size=2)


def test_sharded_and_replicated_runs_warn_of_nothing(runs):
    assert "view" not in (runs / "stderr.txt").read_text()


def test_an_error_of_one_process_ends_all_in_one_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom llamagen_unitok.runtime.distributed import processes\n"
        "from llamagen_unitok.runtime.flags import run_cli\n"
        "def fail():\n    raise ValueError('file 7 is cut short')\n"
        "def body():\n    with processes('cpu') as world:\n"
        "        assert world.together(lambda: world.rank + 1) == world.rank + 1\n"
        "        world.together(fail if world.rank == 1 else lambda: None)\n"
        "sys.exit(run_cli(body))\n"
    )
    result = torchrun(script)
    assert result.returncode != 0 and result.stderr.count("file 7 is cut short\n") == 1
    assert f'File "{script}"' not in result.stderr
