"""Diagnostics of a generator: where it is unsure, whether its codes are spread as the data's, what it repeats."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from llamagen_unitok.config import GPTConfig, code_differences
from llamagen_unitok.evaluation.codebooks import count_codes, jensen_shannon_bits, usage_figures
from llamagen_unitok.evaluation.diagnostic_plots import plot_likelihood, plot_nearness, plot_usage
from llamagen_unitok.evaluation.images import seeded_subset
from llamagen_unitok.evaluation.nearest import CodeMatches, nearest_by_codes, nearest_by_features
from llamagen_unitok.evaluation.plots import save_plot
from llamagen_unitok.gpt import GPT
from llamagen_unitok.grid import labelled_grid
from llamagen_unitok.pipeline import ImageGenerator
from llamagen_unitok.runtime.files import check_writable_folder, replacing
from llamagen_unitok.runtime.memory import explained_batch
from llamagen_unitok.sampling import SamplingConfig
from llamagen_unitok.training.data import CodeMeta, CodeShards

FLAG = "--codes"
NEIGHBOURS = 3  # training pictures beside each sample
DEFINITIONS = {
    "likelihood": "bits per code under teacher forcing, mean over training entries, one seeded view of each",
    "usage": "share of a codebook's entries that occur; perplexity is exp of the histogram's entropy in nats",
    "jensen_shannon_bits": "divergence of the histograms of samples and data; of_data is that of as many training "
    "entries as there are samples, the least that this number of samples can be expected to show",
    "largest_equal_share": "largest share of codes in common with a training entry (same place, same code), best view; "
    "of_training is that of training entries among the others",
    "retrieval": "accuracy is the share of samples whose nearest training picture, by cosine similarity of features of "
    "pictures decoded from codes, has the sample's class; no more than share_with_class_compared, the share of samples "
    "whose class is among the training pictures compared",
}

# Pictures, uint8 (H, W, 3) each → features (N, E), float.
Extract = Callable[[list[np.ndarray]], Tensor]


@dataclass(frozen=True)
class DiagnosisSettings:
    """With which training codes a generator is compared, and how much of everything is looked at."""

    codes: Path = field(metadata={"flag": FLAG, "help": "code shards of the training pictures (extract_codes.py)"})
    limit: int = field(default=2000, metadata={"help": "training pictures of the likelihood and of the histograms"})
    samples: int = field(default=200, metadata={"help": "pictures to draw, spread evenly over the classes"})
    compared: int = field(default=20_000, metadata={"help": "training pictures, all views, compared with samples"})
    subset_seed: int = field(default=0, metadata={"help": "which training pictures those are"})
    batch_size: int = field(default=8, metadata={"help": "pictures at a time"})
    shown: int = field(default=16, metadata={"help": "samples shown beside their nearest training pictures"})
    pictures: Path | None = field(default=None, metadata={"help": "folder for plots and pictures (default: none)"})

    def __post_init__(self) -> None:
        for name in ("limit", "samples", "compared", "batch_size", "shown"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.subset_seed < 0:
            raise ValueError(f"--subset-seed must be at least 0, not {self.subset_seed}")


class Likelihood(NamedTuple):
    """bits: (L, K) float64, mean bits of each code.   per_picture: (N,) float64, mean bits per code of each picture."""

    bits: np.ndarray
    per_picture: np.ndarray


class Samples(NamedTuple):
    """labels: (N,) int64.   codes: (N, L, K) int64.   features: (N, E), or None without an extractor."""

    labels: np.ndarray
    codes: np.ndarray
    features: Tensor | None


def diagnose(
    generator: ImageGenerator,
    settings: DiagnosisSettings,
    *,
    sampling: SamplingConfig | None = None,
    extract: Extract | None = None,
    tokenizer_hash: str | None = None,
) -> dict[str, Any]:
    """Measure a generator against its training codes; returns the figures as a JSON object.

    sampling: how samples are drawn; None for the defaults.   extract: features of pictures; with it the nearest
    training pictures (first view, decoded from the codes) are also looked up by features, which gives the
    class-retrieval accuracy.   tokenizer_hash: content hash of the generator's tokenizer; the figures then say whether
    it made the codes (one whose decoder alone was trained on makes the same codes under another hash).
    With `settings.pictures`, plots and pictures are written to that folder. Shards are read in pieces; only features
    grow in memory with the number of pictures compared.
    Raises ValueError, in one line, when the shards do not fit the generator or a setting is impossible.
    """
    sampling = sampling or SamplingConfig()
    shards = CodeShards(settings.codes)
    check_codes_fit(generator.gpt.config, shards.meta, settings.codes)
    sampling.check_generator(generator.gpt.config)
    if settings.pictures:
        check_writable_folder("--pictures", settings.pictures)
    order = np.random.default_rng([settings.subset_seed, 0]).permutation(len(shards))
    taken, control = np.sort(order[: settings.limit]), np.sort(order[settings.limit :][: settings.samples])
    compared = seeded_subset(len(shards), settings.compared, settings.subset_seed)
    figures: dict[str, Any] = {
        "codes": str(settings.codes),
        "training_pictures": len(shards),
        "subset_seed": settings.subset_seed,
        "batch_size": settings.batch_size,
        "sampling": asdict(sampling),
        "definitions": DEFINITIONS,
    }
    if tokenizer_hash is not None:
        figures["tokenizer_made_the_codes"] = tokenizer_hash == shards.meta.tokenizer_hash

    batches = tqdm(
        read_entries(shards, taken, settings),
        desc="likelihood",
        unit="batch",
        total=math.ceil(len(taken) / settings.batch_size),
        dynamic_ncols=True,
    )
    likelihoods = measure_likelihoods(generator.gpt, batches)
    figures["likelihood"] = _likelihood_figures(likelihoods, shards.meta.codebook_size)

    samples = draw_samples(generator, settings, sampling, extract)
    counts = {"data": count_entries(shards, taken, settings), "samples": _count(samples.codes, shards.meta)}
    divergence = jensen_shannon_bits(counts["data"], counts["samples"])
    figures["usage"] = {name: usage_figures(histogram) for name, histogram in counts.items()}
    figures["usage"] |= _divergence_figures("jensen_shannon_bits", divergence)
    if len(control) == settings.samples:
        of_data = jensen_shannon_bits(counts["data"], count_entries(shards, control, settings))
        figures["usage"] |= _divergence_figures("jensen_shannon_bits_of_data", of_data)

    matches = nearest_by_codes(samples.codes, shards, compared, min(NEIGHBOURS, len(compared)))
    among_others = _training_among_others(shards, compared, settings)
    nearness = {"samples": matches.share[:, 0], "training among others": among_others}
    figures["memorisation"] = {
        "samples": settings.samples,
        "compared_pictures": len(compared),
        "views": len(shards.meta.views),
        "share_exact": float((matches.share[:, 0] == 1).mean()),
        "largest_equal_share": _spread(matches.share[:, 0]),
        "largest_equal_share_of_training": _spread(among_others),
    }
    by_features = None
    if extract:
        reference, labels = _training_features(generator, shards, compared, extract, settings)
        by_features = nearest_by_features(samples.features, reference, min(NEIGHBOURS, len(compared)))
        own_class = labels[by_features.rows[:, 0].cpu().numpy()] == samples.labels
        figures["retrieval"] = {
            "accuracy": float(own_class.mean()),
            "chance": float(np.mean(samples.labels[:, None] == labels)),
            "compared_pictures": len(compared),
            "share_with_class_compared": float(np.isin(samples.labels, labels).mean()),
            "similarity": _spread(by_features.similarity[:, 0].double().cpu().numpy()),
        }
    if settings.pictures:
        plots = {
            "likelihood": plot_likelihood({n: m.bits for n, m in likelihoods.items()}, shards.meta.grid),
            "usage": plot_usage(counts["data"], counts["samples"], divergence),
            "nearness": plot_nearness({name: values for name, values in nearness.items() if len(values)}),
        }
        sheets = {"nearest": _nearest_sheet(generator, shards, samples, matches, settings.shown, "{:.1%} equal")}
        if by_features:
            rows = by_features.rows.cpu().numpy()
            found = CodeMatches(by_features.similarity.cpu().numpy(), compared[rows], np.zeros_like(rows))
            sheets["nearest_by_features"] = _nearest_sheet(
                generator, shards, samples, found, settings.shown, "cosine {:.3f}"
            )
        figures["pictures"] = _write_pictures(settings.pictures, plots, sheets)
    return figures


def check_codes_fit(config: GPTConfig, meta: CodeMeta, folder: Path) -> None:
    """Raise ValueError, in one line, unless these codes are such as this generator makes."""
    differences = code_differences(meta, config)
    if len(meta.class_names) > config.num_classes:
        differences.append(f"{len(meta.class_names)} classes instead of {config.num_classes}")
    if differences:
        raise ValueError(
            f"{FLAG} {folder} does not fit the generator: {', '.join(differences)}; "
            "give the codes that the generator was trained on, made by its tokenizer"
        )


def read_entries(
    shards: CodeShards, entries: np.ndarray, settings: DiagnosisSettings
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Labels (B,) and codes (B, L, K), int64, of training entries, each in one view that follows from the seed."""
    views = np.random.default_rng([settings.subset_seed, 1]).integers(len(shards.meta.views), size=len(shards))
    for chunk in _chunks(entries, settings.batch_size):
        labels, codes = shards.entries(chunk)
        yield labels, codes[np.arange(len(chunk)), views[chunk]].astype(np.int64)


def count_entries(shards: CodeShards, entries: np.ndarray, settings: DiagnosisSettings) -> np.ndarray:
    """Histograms (K, V) of what `read_entries` gives."""
    return sum(_count(codes, shards.meta) for _, codes in read_entries(shards, entries, settings))


@torch.inference_mode()
def measure_likelihoods(gpt: GPT, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, Likelihood]:
    """Bits of each code under teacher forcing: "conditional", and "unconditional" where there is a null class.

    batches: labels (B,) and codes (B, L, K), int64. Summed in float64, so that how they were cut moves the last digits
    only. Raises ValueError when the generator gives numbers that are not finite.
    """
    device, null = gpt.norm.weight.device, gpt.config.num_classes
    totals: dict[str, Tensor] = {}
    means: dict[str, list[Tensor]] = {}
    for labels, codes in batches:
        own, codes = torch.from_numpy(labels).to(device), torch.from_numpy(codes).to(device)
        conditions = {"conditional": own}
        if gpt.config.has_null_class:
            conditions["unconditional"] = torch.full_like(own, null)
        for name, given in conditions.items():
            with explained_batch(len(codes)):
                bits = gpt.nll(given, codes).double() / math.log(2)  # (B, L, K)
            if not bool(torch.isfinite(bits).all()):
                raise ValueError("the generator gives likelihoods that are not finite: its weights are damaged")
            totals[name] = totals.get(name, 0) + bits.sum(dim=0)
            means.setdefault(name, []).append(bits.mean(dim=(1, 2)).cpu())
    per_picture = {name: torch.cat(parts).numpy() for name, parts in means.items()}
    return {
        name: Likelihood(total.cpu().numpy() / len(per_picture[name]), per_picture[name])
        for name, total in totals.items()
    }


def draw_samples(
    generator: ImageGenerator, settings: DiagnosisSettings, sampling: SamplingConfig, extract: Extract | None = None
) -> Samples:
    """Draw `settings.samples` pictures, labels spread evenly over all classes; pictures are kept as features only."""
    classes = len(generator.names)
    labels = [i * classes // settings.samples for i in range(settings.samples)]
    stream = generator.stream(labels, batch_size=settings.batch_size, progress=True, **asdict(sampling))
    codes, features = [], []
    while batch := list(islice(stream, settings.batch_size)):
        codes += [sample.codes.numpy() for sample in batch]
        if extract:
            features.append(extract([np.asarray(sample.picture) for sample in batch]))
    return Samples(np.array(labels), np.stack(codes), torch.cat(features) if extract else None)


def _training_features(
    generator: ImageGenerator, shards: CodeShards, entries: np.ndarray, extract: Extract, settings: DiagnosisSettings
) -> tuple[Tensor, np.ndarray]:
    """Features (M, E) and labels (M,) of training entries, their first view decoded from its codes."""
    features, labels = [], []
    with tqdm(total=len(entries), desc="features of training pictures", unit="picture", dynamic_ncols=True) as bar:
        for chunk in _chunks(entries, settings.batch_size):
            own, codes = shards.entries(chunk)
            pictures = generator.decode(torch.from_numpy(codes[:, 0].astype(np.int64)))
            features.append(extract([np.asarray(picture) for picture in pictures]))
            labels.append(own)
            bar.update(len(chunk))
    return torch.cat(features), np.concatenate(labels)


def _training_among_others(shards: CodeShards, compared: np.ndarray, settings: DiagnosisSettings) -> np.ndarray:
    """Largest equal share of up to `samples` training entries (first view) with the others among `compared`."""
    if len(compared) < 2:
        return np.empty(0)
    rows = seeded_subset(len(compared), settings.samples, settings.subset_seed)
    codes = shards.entries(compared[rows])[1][:, 0]
    return nearest_by_codes(codes, shards, compared, not_entry=compared[rows]).share[:, 0]


def _nearest_sheet(
    generator: ImageGenerator, shards: CodeShards, samples: Samples, matches: CodeMatches, shown: int, nearness: str
) -> Image.Image:
    """Samples, each followed by its nearest training pictures: evenly spread from the nearest to the farthest."""
    ranked = np.argsort(-matches.share[:, 0], kind="stable")
    rows = ranked[[i * len(ranked) // shown for i in range(shown)] if shown < len(ranked) else slice(None)]
    groups = []
    for row in rows:
        codes = shards.entries(matches.entries[row])[1][np.arange(matches.entries.shape[1]), matches.views[row]]
        whole = np.concatenate([samples.codes[row][None], codes.astype(np.int64)])
        label = int(samples.labels[row])
        title = f"{nearness.format(matches.share[row, 0])}: {label} {generator.names[label]}, then nearest"
        groups.append((title, generator.decode(torch.from_numpy(whole))))
    return labelled_grid(groups)


def _write_pictures(folder: Path, plots: Mapping[str, Figure], sheets: Mapping[str, Image.Image]) -> dict[str, str]:
    """Write everything as PNG; returns name → path."""
    folder.mkdir(exist_ok=True)
    paths = {name: folder / f"{name}.png" for name in (*plots, *sheets)}
    for name, plot in plots.items():
        save_plot(plot, paths[name])
    for name, sheet in sheets.items():
        with replacing(paths[name]) as file:
            sheet.save(file, format="PNG")
    return {name: str(path) for name, path in paths.items()}


def _likelihood_figures(likelihoods: Mapping[str, Likelihood], codebook_size: int) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "pictures": len(likelihoods["conditional"].per_picture),
        "uniform_bits_per_code": math.log2(codebook_size),
        "unconditional": None,
    }
    for name, (bits, per_picture) in likelihoods.items():
        count = len(per_picture)
        figures[name] = {
            "bits_per_code": float(bits.mean()),
            "standard_error": float(per_picture.std(ddof=1) / math.sqrt(count)) if count > 1 else None,
            "bits_per_picture": float(bits.sum()),
            "by_codebook": bits.mean(axis=0).tolist(),
            "by_position": bits.mean(axis=1).tolist(),
            "by_codebook_and_position": bits.T.tolist(),
        }
    return figures


def _divergence_figures(name: str, bits: np.ndarray) -> dict[str, Any]:
    return {name: bits.tolist(), f"{name}_mean": float(bits.mean())}


def _spread(values: np.ndarray) -> dict[str, float] | None:
    """Mean and quantiles of numbers as JSON; None without any."""
    if not len(values):
        return None
    quantiles = {"min": 0, "median": 0.5, "p90": 0.9, "max": 1}
    return {"mean": float(values.mean())} | {name: float(np.quantile(values, at)) for name, at in quantiles.items()}


def _count(codes: np.ndarray, meta: CodeMeta) -> np.ndarray:
    return count_codes(codes, meta.codebook_size)


def _chunks(entries: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(entries), size):
        yield entries[start : start + size]
