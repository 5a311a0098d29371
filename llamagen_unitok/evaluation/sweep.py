"""Sampling settings → figures: a table that grows by one row a setting, on any number of processes, and can be resumed.

OUT/results.jsonl       one row a setting, with all that says where it comes from; results.csv is the same for a sheet
OUT/samples/KEY.npz     samples of the setting that is being measured (all of them with `keep_samples`)
OUT/pictures/KEY.png    samples of each setting, spread evenly over the classes
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llamagen_unitok.evaluation.extractors import Extractor
from llamagen_unitok.evaluation.figures import EvaluationSettings, evaluate_samples, figure_name, plan
from llamagen_unitok.evaluation.metrics import METRICS, Metric
from llamagen_unitok.evaluation.npz import NpzReader
from llamagen_unitok.evaluation.provenance import model_record
from llamagen_unitok.evaluation.references import Reference
from llamagen_unitok.evaluation.samples import SampleRun, deciding, run_record, run_samples
from llamagen_unitok.gpt import GPT
from llamagen_unitok.grid import labelled_grid
from llamagen_unitok.pipeline import ImageGenerator, pick_dtype
from llamagen_unitok.published.cache import locate_model
from llamagen_unitok.runtime.distributed import World
from llamagen_unitok.runtime.files import replacing
from llamagen_unitok.sampling import SamplingConfig
from llamagen_unitok.sampling.batches import propose_batch_size
from tokenizer import read_tokenizer_config
from tokenizer.images import Resize

ROWS_NAME, SHEET_NAME = "results.jsonl", "results.csv"
SHOWN = 32  # samples in a setting's picture
GOLDEN = (math.sqrt(5) - 1) / 2
SCALE_DIGITS = 3  # guidance scales that a search proposes are rounded to these, so that a row can be found again
_SETTINGS = tuple(f.name for f in dataclasses.fields(SamplingConfig) if f.name != "seed")
_GUIDANCE_ONLY = ("cfg_schedule", "cfg_power", "cfg_interval")


@dataclass(frozen=True)
class Setting:
    """One row to be: a checkpoint and how to sample from it."""

    checkpoint: str
    sampling: SamplingConfig

    def at_scale(self, scale: float) -> Setting:
        """The same with another guidance scale."""
        return dataclasses.replace(self, sampling=with_effect(dataclasses.replace(self.sampling, cfg_scale=scale)))


def with_effect(sampling: SamplingConfig) -> SamplingConfig:
    """The same with all at its default that has no effect beside the rest, so that equal runs are equal settings."""
    default = SamplingConfig()
    idle: tuple[str, ...] = ()
    if sampling.cfg_scale == 1:
        idle += _GUIDANCE_ONLY
    if sampling.cfg_schedule != "power-cosine":
        idle += ("cfg_power",)
    if sampling.temperature == 0:
        idle += ("top_k", "top_p")
    return dataclasses.replace(sampling, **{name: getattr(default, name) for name in idle})


def grid(checkpoints: Sequence[str], values: dict[str, Sequence[Any]], seed: int) -> list[Setting]:
    """All combinations, each once: those that differ in what has no effect are one (`with_effect`).

    values: a field of SamplingConfig → its values; others stay at their defaults.

    Raises ValueError for impossible values, and where a generator cannot follow a setting; no weights are read.
    """
    settings = [
        Setting(checkpoint, with_effect(SamplingConfig(**dict(zip(values, combination, strict=True)), seed=seed)))
        for checkpoint in checkpoints
        for combination in product(*values.values())
    ]
    for checkpoint in checkpoints:
        config = GPT.read_config(GPT.part_of(locate_model(checkpoint)))
        for setting in settings:
            if setting.checkpoint == checkpoint:
                setting.sampling.check_generator(config)
    return list(dict.fromkeys(settings))


class Table:
    """The rows of a sweep on disk. Every process holds them; the main one writes. Rows are complete or not there."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world
        path = folder / ROWS_NAME
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                try:
                    row = json.loads(line)
                    self.rows[row["key"]] = row
                except (json.JSONDecodeError, KeyError, TypeError):
                    raise ValueError(f"{path}, line {number}, is no row of a sweep: repair or remove it") from None
        world.barrier()  # nobody writes before all have read

    def add(self, row: dict[str, Any]) -> None:
        """Take over a row, and write both files."""
        self.rows[row["key"]] = row
        if not self.world.is_main:
            return
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows.values()]
        with replacing(self.folder / ROWS_NAME) as file:
            file.write("".join(lines).encode())
        columns = list(dict.fromkeys(name for row in self.rows.values() for name in row if name != "warnings"))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows.values())
        with replacing(self.folder / SHEET_NAME) as file:
            file.write(text.getvalue().encode())


class Sweep:
    """Measures settings, one after the other, into a table."""

    def __init__(
        self,
        out: Path,
        reference: Reference,
        extractor: Extractor,
        world: World,
        *,
        labels: str = SampleRun.labels,
        batch_size: int | str = SampleRun.batch_size,
        tokenizer: str | None = None,
        dtype: str = "auto",
        engine: str = "auto",
        decoder: str = "plain",
        resize: Resize | None = None,
        metrics: Sequence[str] | None = None,
        features_batch_size: int = EvaluationSettings.batch_size,
        keep_samples: bool = False,
        progress: bool = True,
    ) -> None:
        """tokenizer: a folder or hub id, if not the bundles' own.   batch_size: "auto" proposes one a checkpoint.
        engine, decoder: rows of ENGINES and DECODERS.   metrics: see `plan`; the Fréchet distance is always among them.
        The rest: see `run_samples`, `evaluate_samples`.
        """
        self.out, self.reference, self.extractor, self.world = out, reference, extractor, world
        self.labels, self.batch_size, self.dtype, self.resize = labels, batch_size, dtype, resize
        self.engine, self.decoder = engine, decoder
        self.tokenizer = locate_model(tokenizer) if tokenizer else None
        self.metrics = None if metrics is None else [*metrics, "FID"]
        self.features_batch_size = features_batch_size
        self.keep_samples, self.progress = keep_samples, progress
        self.reference_hash = world.share_outcome(lambda: reference.content_hash)
        if world.is_main:
            for name in ("samples", "pictures"):
                (out / name).mkdir(parents=True, exist_ok=True)
        world.barrier()
        self.table = Table(out, world)
        self.measured = 0  # rows that had to be made
        self._asked: dict[str, Setting] = {}
        self._proposed: dict[str, int] = {}
        self._models: dict[str, dict[str, str]] = {}
        self._loaded: tuple[str, ImageGenerator] | None = None

    def check(self, settings: Sequence[Setting], counts: Sequence[int]) -> None:
        """ValueError for what would fail only after sampling: metrics, reference, size and number of the samples.

        counts: numbers of samples of a setting. No weights are read.
        """
        for checkpoint in dict.fromkeys(setting.checkpoint for setting in settings):
            for count in dict.fromkeys(counts):
                self.world.together(lambda checkpoint=checkpoint, count=count: self._plan(checkpoint, count))

    def measure(self, setting: Setting, num_samples: int) -> dict[str, Any]:
        """The row of a setting: from the table where all its figures are there, else measured and added.

        What a row in the table has beyond the figures asked for is measured again with them, so that all figures of a
        row have one origin. Models are read for new samples only.
        """
        record = self._record(setting, num_samples)
        origin = {
            "extractor": self.extractor.name,
            "weights_hash": self.extractor.weights_hash,
            "reference_hash": self.reference_hash,
        }
        key = hashlib.sha256(json.dumps(deciding(record) | origin, sort_keys=True).encode()).hexdigest()[:16]
        self._asked[key] = setting
        found = self.table.rows.get(key, {})
        metrics = self._plan(setting.checkpoint, num_samples)
        if found and all(name in found for metric in metrics.values() for name in self._names(metric)):
            return found
        metrics |= {key: metric for key, metric in METRICS.items() if set(self._names(metric)) & found.keys()}
        generator = self._generator(setting.checkpoint)
        samples = self.out / "samples" / f"{key}.npz"
        run_samples(generator, record, samples, self.world, progress=self.progress)
        figures = evaluate_samples(
            samples,
            self.reference,
            self.extractor,
            metrics=list(metrics),
            batch_size=self.features_batch_size,
            progress=self.progress,
            world=self.world,
        )
        if self.world.is_main:
            self._picture(samples, generator, self.out / "pictures" / f"{key}.png")
        row = {
            "key": key,
            "checkpoint": setting.checkpoint,
            **{name: record[name] for name in _SETTINGS},
            "num_samples": num_samples,
            **{name: value for name, value in figures.items() if name not in ("num_samples", "reference_hash")},
            **{name: value for name, value in record.items() if name not in (*_SETTINGS, "num_samples", "format")},
            **origin,
        }
        self.table.add(row)
        self.world.barrier()
        if self.world.is_main and not self.keep_samples:
            samples.unlink(missing_ok=True)
        self.measured += 1
        return row

    def frechet(self, row: dict[str, Any]) -> float:
        """The figure that a search minimises."""
        return row[self.extractor.frechet_name]

    def rows(self) -> list[dict[str, Any]]:
        """The table's rows that were measured as this sweep measures, now or earlier."""
        mine = (self.extractor.name, self.extractor.weights_hash, self.reference_hash)
        names = ("extractor", "weights_hash", "reference_hash")
        return [
            row
            for row in self.table.rows.values()
            if tuple(row[name] for name in names) == mine and self.extractor.frechet_name in row
        ]

    def confirm(self, num_samples: int) -> dict[str, Any]:
        """Measure the best setting that `measure` was asked for once more, with so many samples."""
        best = min(self._asked, key=lambda key: self.frechet(self.table.rows[key]))
        return self.measure(self._asked[best], num_samples)

    def refine(self, settings: Sequence[Setting], evaluations: int, num_samples: int) -> None:
        """Golden-section search for the guidance scale of least Fréchet distance, from a grid already measured.

        The search is between the neighbours of each group's best scale; a group is what differs in the scale only.
        Groups with fewer than two scales have nothing to search between.
        """
        for group in by_scale(settings):
            if len(group) < 2 or not evaluations:
                continue
            scales = sorted(group)
            best = min(scales, key=lambda scale: self.frechet(self.measure(group[scale], num_samples)))
            at = scales.index(best)
            low, high = scales[max(0, at - 1)], scales[min(len(scales) - 1, at + 1)]
            start = next(setting for scale, setting in group.items() if scale != 1)  # which knows the schedule
            for scale in golden_section(
                lambda x, start=start: self.frechet(self.measure(start.at_scale(x), num_samples)),
                low,
                high,
                evaluations,
            ):
                if self.world.is_main and self.progress:
                    print(f"best guidance scale so far: {scale:g}")

    def _plan(self, checkpoint: str, num_samples: int) -> dict[str, Metric]:
        if self.resize:
            side = self.resize.side
        else:
            side = read_tokenizer_config(self.tokenizer or locate_model(checkpoint)).img_size
        return plan(self.metrics, self.reference, self.extractor, (side, side), num_samples)

    def _names(self, metric: Metric) -> list[str]:
        return [figure_name(name, self.extractor) for name in metric.gives]

    def _record(self, setting: Setting, num_samples: int) -> dict[str, Any]:
        checkpoint, device = setting.checkpoint, self.world.device
        if checkpoint not in self._models:
            folder = locate_model(checkpoint)
            self._models[checkpoint] = self.world.share_outcome(lambda: model_record(folder, self.tokenizer))
        return run_record(
            self._models[checkpoint],
            SampleRun(num_samples, self.labels, self._batch_size(checkpoint)),
            setting.sampling,
            device=device,
            dtype=pick_dtype(self.dtype, device),
            resize=self.resize,
            decoder=self.decoder,
            engine=self.engine,
        )

    def _generator(self, checkpoint: str) -> ImageGenerator:
        if self._loaded is None or self._loaded[0] != checkpoint:
            self._loaded = None  # the last one's memory is free before the next one is read
            folder = locate_model(checkpoint)
            generator = ImageGenerator.from_pretrained(folder, self.tokenizer, self.world.device, self.dtype)
            generator.resize = self.resize
            generator.use_decoder(self.decoder)
            self._loaded = (checkpoint, generator)
        return self._loaded[1]

    def _batch_size(self, checkpoint: str) -> int:
        """One for all settings of a checkpoint, guided or not: that of its rows in the table, else a proposal."""
        if self.batch_size != "auto":
            return self.batch_size
        if checkpoint not in self._proposed:
            earlier = [row["batch_size"] for row in self.table.rows.values() if row["checkpoint"] == checkpoint]
            generator = None if earlier else self._generator(checkpoint)
            self._proposed[checkpoint] = self.world.share_outcome(
                lambda: earlier[-1] if earlier else propose_batch_size(generator.gpt, guided=True)
            )
        return self._proposed[checkpoint]

    def _picture(self, samples: Path, generator: ImageGenerator, png: Path) -> None:
        """A sheet of samples spread evenly over the classes: over all samples in the order of their labels."""
        reader = NpzReader(samples)
        labels = reader.read("label")
        order = np.argsort(labels, kind="stable")
        shown = min(SHOWN, len(order))
        groups = []
        for number in order[np.arange(shown) * len(order) // shown].tolist():
            pixels = next(reader.batches("arr_0", 1, number, number + 1))[0]
            groups.append((generator.names[int(labels[number])], [Image.fromarray(pixels)]))
        with replacing(png) as file:
            labelled_grid(groups).save(file, format="PNG")


def by_scale(settings: Sequence[Setting]) -> list[dict[float, Setting]]:
    """Settings in groups that differ in the guidance scale only (see `lines_over_scale`): scale → setting."""
    items = [{"checkpoint": one.checkpoint, **dataclasses.asdict(one.sampling), "setting": one} for one in settings]
    return [{item["cfg_scale"]: item["setting"] for item in line} for line in lines_over_scale(items)]


def lines_over_scale(items: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Settings in lines that differ in the guidance scale only, each in ascending order of it.

    items: a checkpoint and the fields of SamplingConfig by name, and anything more. What has no guidance is on the line
    of every schedule.
    """

    def values(item: dict[str, Any], names: Sequence[str]) -> tuple:
        return tuple(item[name] for name in names)

    others = ("checkpoint", *(name for name in _SETTINGS if name not in ("cfg_scale", *_GUIDANCE_ONLY)))
    lines: dict[tuple, list[dict[str, Any]]] = {}
    for item in items:
        if item["cfg_scale"] != 1:
            lines.setdefault((values(item, others), values(item, _GUIDANCE_ONLY)), []).append(item)
    for item in items:
        if item["cfg_scale"] == 1:
            own = [line for (rest, _), line in lines.items() if rest == values(item, others)]
            for line in own or [lines.setdefault((values(item, others), ()), [])]:
                line.append(item)
    return [sorted(line, key=lambda item: item["cfg_scale"]) for line in lines.values()]


def golden_section(f: Callable[[float], float], low: float, high: float, evaluations: int) -> Iterator[float]:
    """Minimise f on [low, high]; yields the best argument so far after each evaluation of f.

    For an f with one valley, an evaluation shrinks the interval that holds the minimum by the golden ratio (0.618).
    """
    seen: dict[float, float] = {}

    def value(x: float) -> float:
        x = round(x, SCALE_DIGITS)
        if x not in seen:
            seen[x] = f(x)
        return seen[x]

    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    newest = left
    for count in range(evaluations):
        value(newest)
        yield min(seen, key=seen.__getitem__)
        if count == 0:
            newest = right
        elif value(left) <= value(right):
            high, right = right, left
            left = newest = high - GOLDEN * (high - low)
        else:
            low, left = left, right
            right = newest = low + GOLDEN * (high - low)
