"""One line per interval on stderr, the same numbers in metrics.jsonl, and curves for TensorBoard when it is there."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm


class TrainingLog:
    """Progress bar with rate and ETA, metrics.jsonl (one JSON object per interval) and TensorBoard events.

    Only the main process should have one. Lines of steps that a resumed run does again are dropped from metrics.jsonl.
    What cannot be written (a full disk) is left out, and one line on stderr says so: a run does not end for want of it.
    """

    def __init__(
        self,
        out: Path,
        first_step: int,
        steps: int,
        batch_size: int,
        figures: Callable[[float], dict[str, float]] | None = None,
    ):
        """figures(images per second): what else follows from the rate, such as MFU."""
        self.figures = figures or (lambda _rate: {})
        self.path = out / "metrics.jsonl"
        self.batch_size = batch_size
        self._warned = False
        with self._unwritten_told():
            out.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= first_step]
                unfinished = self.path.with_suffix(".tmp")
                unfinished.write_text("".join(line + "\n" for line in kept))
                unfinished.rename(self.path)
        self.bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True, mininterval=1.0)
        self._last = (first_step, time.perf_counter())
        self.board = None
        with self._unwritten_told():
            self.board = _board(out / "tensorboard", first_step)

    def advance(self) -> None:
        """One more step is done."""
        self.bar.update()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record `values` after `step` steps, and pictures per second since the last call."""
        last_step, last_time = self._last
        now = time.perf_counter()
        rate = (step - last_step) * self.batch_size / (now - last_time)
        self._last = (step, now)
        self.record(step, {**values, "images_per_sec": rate, **self.figures(rate)})

    def record(self, step: int, values: dict[str, float]) -> None:
        """Record `values` after `step` steps as they are."""
        rounded = {name: float(f"{value:.7g}") for name, value in values.items()}
        with self._unwritten_told():
            _append(self.path, json.dumps({"step": step, **rounded}) + "\n")
        board, self.board = self.board, None  # one that failed has lost its writer
        with self._unwritten_told():
            for name, value in values.items() if board is not None else ():
                board.add_scalar(name, value, step)
            self.board = board
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.bar.write(f"step {step}  {shown}", file=self.bar.fp)

    def close(self) -> None:
        """Finish the bar and flush the curves."""
        self.bar.close()
        with self._unwritten_told():
            if self.board is not None:
                self.board.close()

    @contextmanager
    def _unwritten_told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                reason = error.strerror or type(error).__name__
                tell(f"the run's figures cannot be written to {self.path.parent}: {reason}")
            self._warned = True


def tell(line: str) -> None:
    """A line on stderr, above the progress bar if there is one."""
    tqdm.write(line, file=sys.stderr)


def _board(folder: Path, first_step: int) -> Any:
    """TensorBoard's writer, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first_step + 1)


def _append(path: Path, line: str) -> None:
    """Add a whole line to a file, or nothing of it."""
    data = line.encode()
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        if file.write(data) < len(data):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # a line cut short by a crash
