"""Training checkpoints: written under a temporary name, then renamed, so what has a proper name is complete.

    OUT/checkpoints/step-00001000/     one checkpoint (torch.distributed.checkpoint files and meta.json)
    OUT/checkpoints/latest             a link to the newest complete one

A checkpoint holds whole tensors under their names, in pieces: it can be read by another number of processes and under
another parallelism than wrote it. The metadata of torch.distributed.checkpoint is a pickle: load checkpoints of your
own runs only. Models are passed on as bundles (safetensors), never as training checkpoints.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from llamagen_unitok.runtime.distributed import World
from llamagen_unitok.runtime.files import clear_unfinished
from llamagen_unitok.runtime.log import tell

META_NAME = "meta.json"
_NAME = re.compile(r"step-\d{8}")
# One process without a group is no surprise. The writer warns in a thread, so a filter around the call would not do.
warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
_FAILURES = (OSError, RuntimeError, CheckpointException)  # what a full or broken disk can end in
_UNREADABLE = (*_FAILURES, KeyError, ValueError, EOFError, pickle.UnpicklingError)


def checkpoint_path(out: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lives."""
    return out / "checkpoints" / f"step-{step:08d}"


class Checkpoints:
    """Writes a run's checkpoints, in the background, never two at once; every process must make the same calls.

    meta: JSON kept with each. keep: how many of the newest stay; keep_every: those of steps that this divides stay
    too, for ever (0 = none). With `background` False, `save` returns when all is written.
    A save that fails (a full disk) says so in one line on stderr, leaves the complete ones before it, and sets
    `failure`, on all processes; the next save tries again.
    """

    def __init__(
        self, out: Path, meta: dict[str, Any], world: World, *, keep: int, keep_every: int = 0, background: bool = True
    ):
        self.out, self.meta, self.world = out, meta, world
        self.keep, self.keep_every, self.background = keep, keep_every, background
        self.failure: str | None = None
        self._writing: tuple[int, Future] | None = None
        self._publisher = ThreadPoolExecutor(1, "checkpoint")
        # Its own group: the writers' messages must not mix with those of the training step.
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        if world.is_main:
            clear_unfinished(out / "checkpoints")

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begin to write `state` (nested dicts of tensors and numbers), once the save before is done.

        The tensors may be changed as soon as this returns.
        """
        self.settle()
        unfinished = _unfinished(checkpoint_path(self.out, step))
        error: BaseException | None = None
        if self.world.is_main:
            try:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
            except OSError as failed:
                error = failed
        if self.world.any(error is not None):
            self._failed(step, error)
            return
        written = dcp.async_save(_apart(state), checkpoint_id=unfinished, process_group=self._group)
        self._writing = step, self._publisher.submit(self._publish, written, step)
        if not self.background:
            self.settle()

    def settle(self) -> None:
        """Wait until the save under way is complete, or has failed, on all processes."""
        if self._writing is None:
            return
        (step, published), self._writing = self._writing, None
        error: BaseException | None = None
        try:
            published.result()
        except _FAILURES as failed:
            error = failed
        if self.world.any(error is not None):
            self._failed(step, error)
        else:
            self.failure = None

    def close(self) -> None:
        """Wait for this process's part of the save under way, whatever becomes of it, and end the writer."""
        self._publisher.shutdown(wait=True)

    def _publish(self, written: Future, step: int) -> None:
        written.result()
        if not self.world.is_main:
            return
        final = checkpoint_path(self.out, step)
        unfinished = _unfinished(final)
        with open(unfinished / META_NAME, "w", encoding="utf-8") as file:
            file.write(json.dumps({**self.meta, "step": step}, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(unfinished)
        if final.exists():
            replaced = unfinished.with_suffix(".old")
            final.rename(replaced)
            shutil.rmtree(replaced, ignore_errors=True)
        unfinished.rename(final)
        _sync_folder(final.parent)
        _point_latest_at(final)
        for old in complete_checkpoints(self.out)[: -self.keep]:
            if not self.keep_every or _step_of(old) % self.keep_every:
                shutil.rmtree(old, ignore_errors=True)

    def _failed(self, step: int, error: BaseException | None) -> None:
        """Every process comes here; the main one tells."""
        self.failure = f"the checkpoint of step {step} could not be written"
        if not self.world.is_main:
            return
        shutil.rmtree(_unfinished(checkpoint_path(self.out, step)), ignore_errors=True)
        complete = complete_checkpoints(self.out)
        newest = f"step {_step_of(complete[-1])}" if complete else "none"
        reason = _reason(error) if error else "another process failed"
        self.failure += f" ({reason}); the newest complete one: {newest}"
        tell(self.failure)


def complete_checkpoints(out: Path) -> list[Path]:
    """All complete checkpoints of a run, oldest first. One whose meta.json a crash left torn does not count."""
    folder = out / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and _is_complete(path))


def find_checkpoint(out: Path, resume: str) -> Path | None:
    """The checkpoint that ``--resume`` means: "auto" the newest of this run or None, "none" None, else a folder."""
    if resume == "none":
        return None
    if resume == "auto":
        return next(reversed(complete_checkpoints(out)), None)
    path = Path(resume).resolve()
    if not _is_complete(path):
        raise ValueError(
            f"--resume {resume} is no complete checkpoint (no sound {META_NAME}): give a step-… folder, or auto"
        )
    return path


def read_meta(path: Path) -> dict[str, Any]:
    """What `Checkpoints` was given as `meta`, and the step."""
    return json.loads((path / META_NAME).read_text(encoding="utf-8"))


def _is_complete(path: Path) -> bool:
    try:
        return "step" in read_meta(path)
    except (OSError, ValueError, TypeError):
        return False


def load_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Fill `state` (of the same names and shapes as was saved, sharded in any way) in place, on all processes.

    ValueError, which names the checkpoint before it, if this one is damaged or does not fit `state`.
    """
    try:
        dcp.load(state, checkpoint_id=path)
    except _UNREADABLE as error:
        raise ValueError(_damaged(path, error)) from error


def read_tensors(path: Path, part: str) -> dict[str, Tensor]:
    """One part of a checkpoint ("model" or "ema") as whole tensors on the CPU; empty when it has no such part."""
    try:
        found = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    except _UNREADABLE as error:
        raise ValueError(_damaged(path, error)) from error
    prefix = f"{part}."
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in found.items()
        if name.startswith(prefix)
    }
    if state:
        load_checkpoint(path, state)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _damaged(path: Path, error: BaseException) -> str:
    older = [other.name for other in complete_checkpoints(path.parent.parent) if other.name < path.name]
    remedy = f"move it away to go on from {older[-1]}" if older else "there is none before it"
    return f"checkpoint {path} cannot be loaded: {_reason(error)}; if it is damaged, {remedy}"


def _unfinished(final: Path) -> Path:
    return final.with_name(f".{final.name}.tmp")


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _apart(state: Any) -> Any:
    """`state` with copies of what lies on the CPU: staging copies from a GPU, and not in every version from a CPU."""
    if isinstance(state, dict):
        return {name: _apart(value) for name, value in state.items()}
    if isinstance(state, Tensor) and state.device.type == "cpu":
        return state.detach().clone()
    return state


def _reason(error: BaseException) -> str:
    """The system's words where there are some, else the first line of the message; one line."""
    causes = [error]
    if isinstance(error, CheckpointException):
        causes = [failure for failure, _ in error.failures.values()]
    for cause in causes:
        while cause is not None:
            if isinstance(cause, OSError) and cause.strerror:
                return cause.strerror
            cause = cause.__cause__ or cause.__context__
    lines = str(causes[0]).strip().splitlines()
    return lines[0] if lines else type(causes[0]).__name__


def _point_latest_at(final: Path) -> None:
    link = final.with_name("latest")
    fresh = final.with_name(".latest.tmp")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(final.name)
    os.replace(fresh, link)


def _sync_folder(folder: Path) -> None:
    """Make sure that the names in a folder outlive a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
