"""Samples against a reference: all figures from one pass over the pictures, and the record that goes with them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamagen_unitok.evaluation.extractors import EXTRACTORS, Extractor, make_extractor
from llamagen_unitok.evaluation.features import FeatureSet, collect_features
from llamagen_unitok.evaluation.images import ImageSource, NpzImages, open_images
from llamagen_unitok.evaluation.metrics import METRICS, Metric
from llamagen_unitok.evaluation.metrics.frechet import rank_warnings
from llamagen_unitok.evaluation.metrics.kid import SUBSET_ROWS
from llamagen_unitok.evaluation.provenance import code_version, command_line, read_record
from llamagen_unitok.evaluation.references import Reference
from llamagen_unitok.runtime.distributed import World, pick_device


class BiasedFigureWarning(UserWarning):
    """A figure is computed, and is not what it seems."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How figures are measured."""

    features: str = field(
        default="inception",
        metadata={"choices": tuple(EXTRACTORS), "metavar": "NAME", "help": f"network: {', '.join(EXTRACTORS)}"},
    )
    metrics: str | None = field(
        default=None, metadata={"help": f"which, with commas: {','.join(METRICS)} (default: all that FEATURES gives)"}
    )
    batch_size: int = field(default=64, metadata={"help": "pictures at a time"})
    inception_weights: Path | None = field(
        default=None,
        metadata={
            "metavar": "FILE",
            "help": "weights-inception-2015-12-05-6726825d.pth (default: torch-fidelity's download)",
        },
    )

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be a whole number of at least 1, got {self.batch_size}")
        if self.inception_weights and self.features != "inception":
            raise ValueError(f"--inception-weights goes with --features inception, not {self.features}")

    def metric_names(self) -> list[str] | None:
        """The metrics asked for; None for all."""
        return [name.strip() for name in self.metrics.split(",")] if self.metrics is not None else None


def shared_extractor(settings: EvaluationSettings, world: World) -> Extractor:
    """The extractor on this process's device; the main process is the first to make it, since that may download."""
    made: list[Extractor] = []

    def make_one() -> None:
        made.append(make_extractor(settings.features, settings.inception_weights, world.device))

    world.share_outcome(make_one)
    if not made:
        make_one()
    return made[0]


def figure_name(name: str, extractor: Extractor) -> str:
    """What Inception's figure `name` is called for `extractor`: FID is FD-EfficientNet, IS_std IS-EfficientNet_std."""
    if extractor.frechet_name == "FID":
        return name
    network = extractor.frechet_name.removeprefix("FD-")
    stem, spread = name.removesuffix("_std"), "_std" if name.endswith("_std") else ""
    return {"FID": "FD", "sFID": "sFD", "KID": "KD"}.get(stem, stem) + f"-{network}{spread}"


def plan(
    metrics: Sequence[str] | None, reference: Reference, extractor: Extractor, size: tuple[int, int], num_samples: int
) -> dict[str, Metric]:
    """What will be measured of `num_samples` pictures of `size` (H, W): the part of METRICS that was asked for.

    metrics: names of METRICS, or of figures; None for all that the extractor and the reference allow.
    Everything that can be wrong is found here, before the first picture is sampled or looked at.
    ValueError, in one line, for names that are not there, and for what network, reference or count cannot give.
    """
    reference.check(extractor, {"pool"} if metrics is None else (), size)
    if metrics is None:
        gives = reference.gives(extractor)
        chosen = {
            name: metric
            for name, metric in METRICS.items()
            if not _not_given(metric.of_samples, extractor) and metric.of_reference <= gives
        }
    else:
        chosen = _named(metrics, extractor)
        for metric in chosen.values():
            if lacking := _not_given(metric.of_samples, extractor):
                raise ValueError(f"--features {extractor.name} gives no {lacking[0]} features: choose other metrics")
    for name, metric in chosen.items():
        counts = {"samples": num_samples}
        if metric.of_reference and reference.images is not None:
            counts["pictures of the reference"] = reference.images.count
        for what, count in counts.items():
            if count < metric.least:
                raise ValueError(f"{name} needs at least {metric.least} {what}, not {count}")
        if metric.of_reference:
            reference.check(extractor, metric.of_reference, size)
    return chosen


def evaluate_samples(
    samples: str | Path,
    reference: str | Path | Reference,
    extractor: Extractor,
    *,
    metrics: Sequence[str] | None = None,
    batch_size: int = EvaluationSettings.batch_size,
    progress: bool = True,
    world: World | None = None,
) -> dict[str, Any]:
    """Figures of samples (.npz or folder) against a reference (ADM's .npz, any .npz of pictures, a folder).

    metrics: see `plan`. Each picture goes through the extractor once; the reference's features are cached, and one that
    is given opened is hashed once. With several processes each takes a share of the pictures and all get the result.
    Distances are computed on the world's device, else on a GPU where there is one.

    Returns the figures by name (`figure_name`), and num_samples, num_reference (pictures behind the statistics, None
    where a file gave them and does not say), num_reference_rows (pictures for precision, recall and KID, None where
    they were not needed), reference_hash and warnings.
    Raises ValueError, in one line, for pictures that cannot be read or compared. Warns with BiasedFigureWarning.
    """
    source = open_images(samples)
    real = reference if isinstance(reference, Reference) else Reference(reference)

    def planned() -> dict[str, Metric]:
        return plan(metrics, real, extractor, source.size, source.count)

    chosen = world.together(planned) if world else planned()
    reference_needs = {need for metric in chosen.values() for need in metric.of_reference}
    seen_real = None
    if reference_needs:
        seen_real = real.features(extractor, reference_needs, batch_size=batch_size, progress=progress, world=world)
    sample_needs = {need for metric in chosen.values() for need in metric.of_samples}
    seen = collect_features(
        source,
        extractor,
        sample_needs,
        required=sample_needs,
        batch_size=batch_size,
        world=world,
        description="samples" if progress else None,
    )

    def compute() -> dict[str, Any]:
        return _figures(chosen, seen, seen_real or FeatureSet(None), real, extractor, world)

    result = world.share_outcome(compute) if world else compute()
    if world is None or world.is_main:
        for text in result["warnings"]:
            warnings.warn(text, BiasedFigureWarning, stacklevel=2)
    return result


def _not_given(needs: Collection[str], extractor: Extractor) -> list[str]:
    """The kinds of features among `needs` that a network lacks."""
    has = {"spatial": extractor.spatial_width is not None, "logit_rows": extractor.has_logits}
    return [need.partition("_")[0] for need in needs if not has.get(need, True)]


def _named(names: Sequence[str], extractor: Extractor) -> dict[str, Metric]:
    by_name = {}
    for key, metric in METRICS.items():
        for name in (key, *metric.gives):
            by_name |= {name.lower(): key, figure_name(name, extractor).lower(): key}
    unknown = [name for name in names if name.lower() not in by_name]
    if unknown or not names:
        raise ValueError(
            f"there is no metric {', '.join(map(repr, unknown)) or 'given'}: choose from {', '.join(METRICS)}"
        )
    wanted = {by_name[name.lower()] for name in names}
    return {key: metric for key, metric in METRICS.items() if key in wanted}


def _figures(
    metrics: dict[str, Metric],
    samples: FeatureSet,
    real: FeatureSet,
    reference: Reference,
    extractor: Extractor,
    world: World | None,
) -> dict[str, Any]:
    device = world.device if world else pick_device()
    result: dict[str, Any] = {}
    for metric in metrics.values():
        figures = metric.compute(samples, real, device)
        result |= {figure_name(key, extractor): value for key, value in figures.items()}
    return {
        **result,
        "num_samples": samples.count,
        "num_reference": real.count,
        "num_reference_rows": None if real.pool_rows is None else len(real.pool_rows),
        "reference_hash": reference.content_hash,
        "warnings": _warnings(metrics, samples, real, extractor),
    }


def _warnings(metrics: dict[str, Metric], samples: FeatureSet, real: FeatureSet, extractor: Extractor) -> list[str]:
    texts = []
    rows = min((len(one.pool_rows) for one in (samples, real) if one.pool_rows is not None), default=SUBSET_ROWS)
    if "KID" in metrics and rows < SUBSET_ROWS:
        texts.append(f"{figure_name('KID', extractor)} is over subsets of {rows:,} pictures, not {SUBSET_ROWS:,}")
    if "FID" in metrics:
        counts = {"samples": samples.count, "reference pictures": real.count}
        texts += rank_warnings(extractor.frechet_name, extractor.width, counts)
    return texts


def evaluation_record(result: dict[str, Any], samples: str | Path, reference: str | Path, extractor: Extractor) -> dict:
    """`evaluate_samples`'s result with all that says where it comes from: for ``--json``. Hashes the samples."""
    source: ImageSource = open_images(samples)
    about = ("num_samples", "num_reference", "num_reference_rows", "reference_hash", "warnings")
    return {
        "figures": {name: value for name, value in result.items() if name not in about},
        "samples": {
            "name": source.path.name,
            "hash": source.content_hash,
            "count": result["num_samples"],
            "size": list(source.size),
            "record": read_record(source.path) if isinstance(source, NpzImages) else None,
        },
        "reference": {
            "name": Path(reference).resolve().name,
            "hash": result["reference_hash"],
            "count": result["num_reference"],
            "rows": result["num_reference_rows"],
        },
        "warnings": result["warnings"],
        **origin(extractor),
    }


def origin(extractor: Extractor | None) -> dict[str, Any]:
    """The part of a record that says with what, by which code and by which command figures were measured."""
    network = extractor and {
        "name": extractor.name,
        "weights_hash": extractor.weights_hash,
        "width": extractor.width,
    }
    return {"extractor": network, "code_version": code_version(), "command": command_line()}
