"""One line per interval on stderr, the same numbers in metrics.jsonl, and curves for TensorBoard when it is there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm


class TrainingLog:
    """Progress bar with rate and ETA, metrics.jsonl (one JSON object per interval) and TensorBoard events.

    Only the main process should have one. Lines of steps that a resumed run does again are dropped from metrics.jsonl.
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
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "metrics.jsonl"
        self.batch_size = batch_size
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= first_step]
            unfinished = self.path.with_suffix(".tmp")
            unfinished.write_text("".join(line + "\n" for line in kept))
            unfinished.rename(self.path)
        self.bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True, mininterval=1.0)
        self._last = (first_step, time.perf_counter())
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)
        except ImportError:
            self.board = None

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
        with open(self.path, "a", encoding="utf-8") as file:
            rounded = {name: float(f"{value:.7g}") for name, value in values.items()}
            file.write(json.dumps({"step": step, **rounded}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.bar.write(f"step {step}  {shown}", file=self.bar.fp)

    def close(self) -> None:
        """Finish the bar and flush the curves."""
        self.bar.close()
        if self.board is not None:
            self.board.close()


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # a line cut short by a crash
