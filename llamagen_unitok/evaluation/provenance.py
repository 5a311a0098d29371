"""Where a figure comes from: hashes of the models, settings, code version and command, kept beside every number.

A *record* is a JSON object. Samples carry theirs inside the .npz (array `record`), figures in their JSON file.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from llamagen_unitok.evaluation.npz import NpzReader
from llamagen_unitok.gpt import GPT
from modelfolder import content_hash
from tokenizer import tokenizer_folder

RECORD_NAME = "record"
ROOT = Path(__file__).resolve().parents[2]


def code_version() -> str:
    """``0.1.0+COMMIT`` in a git clone (with ``.dirty`` when tracked files are changed), else the package's version."""
    try:
        number = version("llamagen-unitok")
    except PackageNotFoundError:
        number = "unknown"
    try:
        described = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty=.dirty", "--exclude=*", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return number
    return f"{number}+{described.stdout.strip()}"


def command_line() -> str:
    """The command that runs now, as a shell would take it; the script by its name, without its folder."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def model_record(generator: Path, tokenizer: Path | None = None) -> dict[str, str]:
    """Content hashes (SHA-256) of a bundle's generator and of the tokenizer used with it, by default its own."""
    return {
        "generator_hash": content_hash(GPT.part_of(generator)),
        "tokenizer_hash": content_hash(tokenizer_folder(tokenizer or generator)),
    }


def as_array(record: dict[str, Any]) -> np.ndarray:
    """A record as the array that an .npz keeps it in."""
    return np.array(json.dumps(record, sort_keys=True))


def read_record(path: str | Path) -> dict[str, Any] | None:
    """The record inside an .npz; None where there is none. ValueError for a damaged file, or a record of others."""
    reader = NpzReader(path)
    if RECORD_NAME not in reader:
        return None
    try:
        record = json.loads(str(reader.read(RECORD_NAME)))
    except json.JSONDecodeError:
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: its array {RECORD_NAME!r} is not the record of a run")
    return record
