"""Which room may import which: read from the imports of every file, wherever in the file they stand."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("modelfolder", "tokenizer", "llamagen_unitok")

# Rooms from the ground up: each imports only rooms above it in this table, and itself.
# A file belongs to the room with the longest name that its module name starts with.
LOWER_FIRST = [
    "modelfolder",
    "tokenizer",
    "llamagen_unitok.cache",
    "llamagen_unitok.config",
    "llamagen_unitok.rope",
    "llamagen_unitok.cross_entropy",
    "llamagen_unitok.layers",
    "llamagen_unitok.official",
    "llamagen_unitok.labels",
    "llamagen_unitok.imagenet",
    "llamagen_unitok.grid",
    "llamagen_unitok.depth_head",
    "llamagen_unitok.gpt",
    "llamagen_unitok.sampling",
    "llamagen_unitok.runtime",
    "llamagen_unitok.pipeline",
    "llamagen_unitok.published",
    "llamagen_unitok.training",
    "llamagen_unitok.evaluation",
]
# The front door names things of several rooms and belongs to none.
FRONT_DOOR = "llamagen_unitok"

# Beyond the order: a room that only these may import.
# Rooms that put both halves together.
BOTH_HALVES = {f"llamagen_unitok.{room}" for room in ("pipeline", "published", "training", "evaluation")}
ONLY_FOR = {
    "tokenizer": BOTH_HALVES,
    "llamagen_unitok.runtime": BOTH_HALVES,
    "llamagen_unitok.pipeline": {"llamagen_unitok.published", "llamagen_unitok.evaluation"},
}
# The trainer of the generator knows no tokenizer: its script hands it a preview.
TOKENIZER_FREE = ["llamagen_unitok.training.generator", "llamagen_unitok.training.loop"]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imported_modules(name: str, path: Path) -> set[str]:
    """Our modules that a file imports; ``from a.b import c`` is a.b.c where that is a module, else a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import():
                found |= {alias.name for alias in node.names}
            case ast.ImportFrom(level=0):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {n if n in FILES else node.module for n in names}
            case ast.ImportFrom():
                raise AssertionError(f"{path}: relative import; write the whole name, so that it can be searched for")
    return {module for module in found if module.split(".")[0] in PACKAGES and module != name}


def room(module: str) -> str:
    rooms = [r for r in LOWER_FIRST if module == r or module.startswith(f"{r}.")]
    assert rooms, f"{module} is in no room: give its file a row in LOWER_FIRST"
    return max(rooms, key=len)


@pytest.mark.parametrize("name", [name for name in FILES if name != FRONT_DOOR])
def test_imports_point_down_only(name):
    own = room(name)
    for module in imported_modules(name, FILES[name]):
        assert module != FRONT_DOOR, f"{name} imports the front door: name the module itself"
        other = room(module)
        if other == own:
            continue
        assert LOWER_FIRST.index(other) < LOWER_FIRST.index(own), f"{name} ({own}) imports {module}, which is above it"
        assert own in ONLY_FOR.get(other, {own}), f"{name} ({own}) may not import {module}"


def test_the_tokenizer_and_the_model_folder_know_nothing_above_them():
    for name, path in FILES.items():
        if name.startswith("tokenizer"):
            assert {m.split(".")[0] for m in imported_modules(name, path)} <= {"tokenizer", "modelfolder"}, name
        if name.startswith("modelfolder"):
            assert {m.split(".")[0] for m in imported_modules(name, path)} <= {"modelfolder"}, name


@pytest.mark.parametrize("name", TOKENIZER_FREE)
def test_the_trainer_of_the_generator_knows_no_tokenizer(name):
    seen, waiting = set(), [name]
    while waiting:
        module = waiting.pop()
        if module in seen or module not in FILES:
            continue
        seen.add(module)
        waiting += imported_modules(module, FILES[module])
    assert not {m for m in seen if m.split(".")[0] == "tokenizer"}


def test_no_package_imports_a_script_or_a_demo_or_a_test():
    above = {path.stem for path in ROOT.glob("*.py")} | {"demo", "tests", "benchmarks"}
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & above, name


def test_files_stay_under_500_lines():
    for name, path in FILES.items():
        assert len(path.read_text(encoding="utf-8").splitlines()) < 500, f"{name} is two rooms"
