"""Training checkpoints: written under a temporary name, then renamed, so what has a proper name is complete.

    OUT/checkpoints/step-00001000/     one checkpoint (torch.distributed.checkpoint files and meta.json)
    OUT/checkpoints/latest             a link to the newest complete one

The metadata of torch.distributed.checkpoint is a pickle: load checkpoints of your own runs only. Models are passed on
as bundles (safetensors), never as training checkpoints.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from llamagen_unitok.runtime.distributed import World

META_NAME = "meta.json"
_NAME = re.compile(r"step-\d{8}")


def checkpoint_path(out: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lives."""
    return out / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(out: Path, step: int, state: dict[str, Any], meta: dict[str, Any], world: World, keep: int) -> Path:
    """Write `state` (nested dicts of tensors and numbers) and `meta` (JSON); every process must call this.

    Afterwards `latest` points at it and only the newest `keep` checkpoints are left.
    """
    final = checkpoint_path(out, step)
    unfinished = final.with_name(f".{final.name}.tmp")
    if world.is_main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    world.barrier()
    with _one_process_is_no_surprise():
        dcp.save(state, checkpoint_id=unfinished, no_dist=world.size == 1)
    if world.is_main:
        (unfinished / META_NAME).write_text(json.dumps({**meta, "step": step}, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        _point_latest_at(final)
        for old in complete_checkpoints(out)[:-keep]:
            shutil.rmtree(old)
    world.barrier()
    return final


def complete_checkpoints(out: Path) -> list[Path]:
    """All complete checkpoints of a run, oldest first."""
    folder = out / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / META_NAME).exists())


def find_checkpoint(out: Path, resume: str) -> Path | None:
    """The checkpoint that ``--resume`` means: "auto" the newest of this run or None, "none" None, else a folder."""
    if resume == "none":
        return None
    if resume == "auto":
        return next(reversed(complete_checkpoints(out)), None)
    path = Path(resume).resolve()
    if not (path / META_NAME).exists():
        raise ValueError(f"--resume {resume} is no complete checkpoint (no {META_NAME}): give a step-… folder, or auto")
    return path


def read_meta(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `meta`, and the step."""
    return json.loads((path / META_NAME).read_text())


def load_checkpoint(path: Path, state: dict[str, Any], world: World) -> None:
    """Fill `state` (of the same structure as was saved) in place. ValueError if the checkpoint does not fit it."""
    try:
        with _one_process_is_no_surprise():
            dcp.load(state, checkpoint_id=path, no_dist=world.size == 1)
    except (RuntimeError, KeyError, ValueError, OSError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"checkpoint {path} cannot be loaded into this run: {reason}") from error


@contextmanager
def _one_process_is_no_surprise() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _point_latest_at(final: Path) -> None:
    link = final.with_name("latest")
    fresh = final.with_name(".latest.tmp")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(final.name)
    os.replace(fresh, link)
