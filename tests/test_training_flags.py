"""Every flag that train_gpt.py parses does something: it is read, and changing it changes plan or first steps."""

import ast
import dataclasses
import functools
import json
from pathlib import Path
from unittest import mock

import pytest
from safetensors.torch import load_file

import train_gpt
import train_tokenizer
from llamagen_unitok import pipeline
from llamagen_unitok.runtime.flags import Parser
from llamagen_unitok.training import data, flops, loop
from llamagen_unitok.training.data import CodeShards
from llamagen_unitok.training.dry_run import DryRun
from llamagen_unitok.training.generator import GeneratorTraining
from llamagen_unitok.training.loop import LoopConfig
from llamagen_unitok.training.recipes import Plan
from tests.random_codes import random_codes
from tests.tiny_generator import tiny_gpt

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (Plan, GeneratorTraining, LoopConfig, DryRun)
FIELDS = [field.name for settings in SETTINGS for field in dataclasses.fields(settings)]

# What a run of three steps, or a dry run, starts from; then for each field what is changed, and what must be there
# with it on both sides.
SHAPE = "--layers 1 --heads 2 --width 32 --depth-layers 1 --ffn-multiple 16"
BASE = "--steps 3 --batch-size 4 --warmup-steps 0 --workers 0 --lr 1e-3 --precision fp32"
RUNS: dict[str, str | tuple[str, str]] = {
    "codes": "--codes {other}",
    "qk_norm": "--qk-norm",
    "class_dropout": "--class-dropout 0",
    "warmup_steps": "--warmup-steps 2",
    "warmup_share": "--warmup-share 0.7",
    "dropout": "--dropout 0",
    "z_loss": "--z-loss 0.1",
    "head_share": "--head-share 0.5",
    "held_out": ("--held-out 0.3 --validate-every 1", "--held-out 0.5 --validate-every 1"),
    "validate_every": ("--held-out 0.3 --validate-every 1", "--held-out 0.3 --validate-every 2"),
    "preview_every": "--preview-every 2",
    "peak_tflops": "--peak-tflops 1",
    "init": "--init {weights}",
    "verify": "--verify",
    "batch_size": "--batch-size 2",
    "recipe": "--recipe llamagen",
    "lr": "--lr 2e-3",
    "lr_schedule": "--lr-schedule linear",
    "weight_decay": "--weight-decay 0.5",
    "beta1": "--beta1 0.5",
    "beta2": "--beta2 0.5",
    "grad_clip": "--grad-clip 0.01",
    "ema": "--ema 0.5",
    "precision": "--precision bf16",
    "accumulate": "--accumulate 2",
    "parallel": "--parallel fsdp",
    "shard_size": ("--parallel hsdp", "--parallel hsdp --shard-size 1"),
    "checkpoint_activations": "--checkpoint-activations full",
    "compile": "--compile on",
    "seed": "--seed 1",
    "workers": "--workers 1",
    "log_every": "--log-every 2",
    "save_every": "--save-every 1",
    "keep": ("--save-every 1", "--save-every 1 --keep 1"),
    "keep_every": ("--save-every 1 --keep 1", "--save-every 1 --keep 1 --keep-every 2"),
    "async_save": "--no-async-save",
}
PLANS: dict[str, str | tuple[str, str]] = {
    "epochs": ("", "--epochs 7"),
    "model": ("", "--model L"),
    "layers": "--layers 2",
    "heads": "--heads 4",
    "width": "--width 64",
    "depth_layers": "--depth-layers 2",
    "ffn_multiple": "--ffn-multiple 64",
    "steps": "--steps 4",
    "gpus": "--gpus 2",
    "gpu_memory": ("--gpus 2", "--gpus 2 --gpu-memory 0.5"),
    "mfu": "--mfu 0.25",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flags")
    gpt = tiny_gpt(layers=1, heads=2, width=32, depth_layers=1, ffn_multiple=16)
    return {
        "codes": random_codes(folder / "codes"),
        "other": random_codes(folder / "other", seed=1),
        "weights": gpt.save_pretrained(folder / "weights"),
    }


def run(words: str, out: Path, places: dict) -> dict:
    """Everything that three steps leave and ask for, but times."""
    asked = []

    def loader(*args, num_workers, **options):
        asked.append(f"{num_workers} workers")
        return real_loader(*args, num_workers=0, pin_memory=options["pin_memory"], **args_of(options))

    def args_of(options: dict) -> dict:
        return {name: value for name, value in options.items() if name == "batch_sampler"}

    def recorded(name):
        """What has an effect on several processes or on a GPU only: that it is asked for as the flag says."""
        real = getattr(loop, name)

        def call(*args, **options):
            asked.append(f"{name} {args[1:] if name == 'wrap_blocks' else ''} {plain(options)}")
            return None if name == "wrap_blocks" else real(*args, **options)

        return mock.patch.object(loop, name, call)

    def plain(options: dict) -> dict:
        return {name: value for name, value in options.items() if isinstance(value, (str, int, bool))}

    def make_preview(_tokenizer, **_options):
        return lambda _gpt, png: (png.parent.mkdir(exist_ok=True), png.touch())

    def verified(self):
        asked.append("verify")

    real_loader = data.DataLoader
    base = BASE.replace("--warmup-steps 0", "") if "--warmup-share" in words else BASE
    command = ["--codes", str(places["codes"]), *SHAPE.split(), *base.split(), *words.format(**places).split()]
    with (
        mock.patch.object(data, "DataLoader", loader),
        recorded("wrap_blocks"),
        recorded("ParallelModule"),
        recorded("Checkpoints"),
        mock.patch.object(CodeShards, "verify", verified),
        mock.patch.object(train_gpt, "locate_model", lambda name, _device: name),
        mock.patch.object(train_gpt, "preflight", lambda *_args, **_options: "checked"),
        mock.patch.object(pipeline, "make_preview", make_preview),
        mock.patch.object(loop, "keep_freed_memory"),
    ):
        assert train_gpt.main([*command, "--out", str(out), "--preview", "any", "--device", "cpu"]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(out / "generator" / "model.safetensors")
    return {
        "asked": asked,
        "weights": sum(t.double().abs().sum().item() for t in weights.values()),
        "logged": [(line["step"], sorted(line)) for line in lines],
        "files": sorted(p.name for kind in ("checkpoints", "previews") for p in (out / kind).glob("step-*")),
    }


def plan(words: str, places: dict, capsys) -> str:
    command = ["--codes", str(places["codes"]), "--gpus", "1", "--dry-run", *words.split()]
    # Counted activations take a second each, and tests/test_flops.py holds them.
    with mock.patch.object(flops, "activations", lambda *_args: flops.Activations(1e9, 1e9)):
        assert train_gpt.main(command) == 0
    return capsys.readouterr().out.split("\nmodel ")[1]


def both(change: str | tuple[str, str]) -> tuple[str, str]:
    return change if isinstance(change, tuple) else ("", change)


def test_every_field_is_in_one_of_the_tables():
    assert sorted(FIELDS) == sorted([*RUNS, *PLANS]), "give a new setting a row: what changes when it does?"


@pytest.fixture(scope="module")
def unchanged(places, tmp_path_factory):
    """Outcomes of the command lines that changes are compared with."""
    known = {}

    def outcome(words: str) -> dict:
        if words not in known:
            known[words] = run(words, tmp_path_factory.mktemp("base") / "run", places)
        return known[words]

    return outcome


def test_the_same_command_does_the_same(places, tmp_path, unchanged, capsys):
    """Else the tests below could not fail."""
    assert run("", tmp_path / "run", places) == unchanged("")
    assert plan(SHAPE, places, capsys) == plan(SHAPE, places, capsys)


@pytest.mark.parametrize("name", RUNS)
def test_a_changed_setting_changes_the_first_steps(name, places, tmp_path, unchanged):
    before, after = both(RUNS[name])
    assert run(after, tmp_path / "run", places) != unchanged(before)


@pytest.mark.parametrize("name", PLANS)
def test_a_changed_setting_changes_the_plan(name, places, capsys):
    before, after = both(PLANS[name])
    base = "--batch-size 4 --warmup-steps 0 "
    base += "--model B --layers 2 " if name in ("model", "gpu_memory") else f"{SHAPE} "
    base += "" if name == "epochs" else "--steps 9 "
    assert plan(base + before, places, capsys) != plan(base + after, places, capsys)


# Settings → what they are called where they are read: file, and the object that a field is read off.
READERS = {
    LoopConfig: {
        "llamagen_unitok/training/loop.py": "config",
        "llamagen_unitok/training/generator.py": "loop",
        "llamagen_unitok/training/dry_run.py": "loop",
        "train_gpt.py": "loop",
    },
    GeneratorTraining: {
        "llamagen_unitok/training/generator.py": "settings",
        "llamagen_unitok/training/preflight.py": "settings",
        "llamagen_unitok/training/dry_run.py": "training",
        "train_gpt.py": "training",
    },
    DryRun: {"llamagen_unitok/training/dry_run.py": "settings"},
    Plan: {"llamagen_unitok/training/recipes.py": "values"},
}


def reads(source: str, owner: str) -> set[str]:
    """Names that functions read off `owner`, as owner.name or owner["name"]; and names that the methods of a settings
    class read off self, getattr included. Checks of settings in their own __post_init__ do not count."""
    found = set()
    tree = ast.parse(source)
    own = [c for c in ast.walk(tree) if isinstance(c, ast.ClassDef) and c.name in {kind.__name__ for kind in SETTINGS}]
    methods = {f for c in own for f in ast.walk(c) if isinstance(f, ast.FunctionDef)}
    for function in (f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name != "__post_init__"):
        owners = {owner, "self"} if function in methods else {owner}
        looks_up = any(ast.unparse(n).startswith("getattr(self") for n in ast.walk(function) if isinstance(n, ast.Call))
        for node in ast.walk(function):
            match node:
                case ast.Attribute(value=ast.Name(id=of), attr=name, ctx=ast.Load()) if of in owners:
                    found.add(name)
                case ast.Subscript(value=ast.Name(id=of), slice=ast.Constant(value=name), ctx=ast.Load()) if (
                    of == owner
                ):
                    found.add(name)
                case ast.Tuple(elts=[*elements]) if function in methods and looks_up:
                    found |= {e.value for e in elements if isinstance(e, ast.Constant)}
    return found


@functools.cache
def read_fields(settings: type) -> set[str]:
    return {
        name
        for file, owner in READERS[settings].items()
        for name in reads((ROOT / file).read_text(encoding="utf-8"), owner)
    }


@pytest.mark.parametrize(
    ("settings", "name"), [(settings, field.name) for settings in SETTINGS for field in dataclasses.fields(settings)]
)
def test_every_setting_is_read_off_its_settings(settings, name):
    assert name in read_fields(settings)


def test_a_name_that_only_looks_like_a_setting_does_not_count_as_read():
    source = "def f(loop, other):\n    other.steps, 'lr', {'seed': 1}, seed\n    loop.keep = 1\n    loop.ema\n"
    assert reads(source, "loop") == {"ema"}
    checked = "class LoopConfig:\n    def __post_init__(self):\n        self.lr\n    def g(self):\n        self.ema\n"
    assert reads(checked, "loop") == {"ema"}


def test_every_other_flag_of_the_script_is_read():
    class Seen(Exception):
        pass

    def stop(self, _argv):
        raise Seen([action.dest for action in self._actions])

    with mock.patch.object(Parser, "parse_args", stop), pytest.raises(Seen) as seen:
        train_gpt.main([])
    others = set(seen.value.args[0]) - set(FIELDS) - {"help"}
    tree = ast.parse((ROOT / "train_gpt.py").read_text(encoding="utf-8"))
    read = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "flags"}
    assert others and others == read & others


@pytest.mark.parametrize("script", [train_gpt, train_tokenizer])
def test_help_fits_a_screen_and_all_of_it_is_there_too(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    screens = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as ended:
            script.main([flag])
        assert ended.value.code == 0
        screens.append(capsys.readouterr().out)
    usual, whole = screens
    assert len(usual.splitlines()) <= 45 and max(map(len, usual.splitlines())) <= 120
    assert all(f"--{name.replace('_', '-')} " in usual for name in ("batch_size", "lr", "precision", "resume"))
    assert "--beta1" not in usual and all(
        f"--{f.name.replace('_', '-')} " in whole for f in dataclasses.fields(LoopConfig) if f.name != "async_save"
    )
    with pytest.raises(SystemExit):
        script.main(["--betta1", "2"])
    assert "(--help-all lists the flags)" in capsys.readouterr().err


@pytest.mark.parametrize("script", [train_gpt, train_tokenizer])
def test_usual_flags_are_flags(script):
    seen = []

    def stop(self, _argv):
        seen.extend(action.dest for action in self._actions)
        raise SystemExit

    with mock.patch.object(Parser, "parse_args", stop), pytest.raises(SystemExit):
        script.main([])
    assert script.USUAL <= set(seen)
