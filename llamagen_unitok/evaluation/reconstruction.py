"""Figures of a tokenizer: how well pictures come back from their codes, and how well the codebooks are used."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from llamagen_unitok.evaluation.codebooks import count_codes, usage_figures
from llamagen_unitok.evaluation.extractors import Extractor
from llamagen_unitok.evaluation.features import check_finite
from llamagen_unitok.evaluation.gaussian import GaussianStatistics
from llamagen_unitok.evaluation.images import open_images, seeded_subset
from llamagen_unitok.evaluation.metrics.frechet import frechet_distance, rank_warnings
from llamagen_unitok.evaluation.picture_quality import LPIPS_TRUNKS, load_lpips, ssim
from llamagen_unitok.grid import BACKGROUND, GAP, INK, labelled_grid
from llamagen_unitok.runtime.files import check_writable_file, replacing
from llamagen_unitok.runtime.memory import explained_batch
from tokenizer import Tokenizer
from tokenizer.images import psnr, to_uint8, to_unit

ERROR_FULL_SCALE = 64  # of 255: an error of this size or more is the brightest colour of the map
DEFINITIONS = {
    "pictures": "ADM centre crop to the tokenizer's size; reconstructions rounded to 8 bits before every comparison",
    "pixels_hash": "SHA-256 of the compared originals, uint8 RGB as cropped, one after the other",
    "psnr_db": "10 log10(255² / mean squared error over pixels and RGB channels) of each picture; equal ones: 106 dB",
    "ssim": "11×11 Gaussian window, sigma 1.5, data range 255, each RGB channel alone, mean over channels and places",
    "lpips": "LPIPS 0.1 at the tokenizer's size, RGB in [-1, 1]",
    "usage": "share of a codebook's entries that occur among these codes",
    "perplexity": "exp of the entropy in nats of a codebook's histogram; as many equally frequent entries",
}

# What else is done with each batch: observer(originals, reconstructions), both uint8 (B, H, W, 3).
Observer = Callable[[np.ndarray, np.ndarray], None]


@dataclass(frozen=True)
class ReconstructionSettings:
    """Which pictures a tokenizer is measured on, and how."""

    images: Path = field(metadata={"flag": "--reconstruct", "help": "pictures: a folder and all below it, or an .npz"})
    limit: int | None = field(default=None, metadata={"help": "only N of the pictures, drawn by --subset-seed"})
    subset_seed: int = field(default=0, metadata={"help": "which pictures --limit keeps"})
    batch_size: int = field(default=16, metadata={"help": "pictures at a time"})
    workers: int = field(default=4, metadata={"help": "threads that read pictures"})
    lpips_network: str = field(default="alex", metadata={"help": "of LPIPS", "choices": tuple(LPIPS_TRUNKS)})
    sheet: Path | None = field(
        default=None, metadata={"help": "PNG to write: originals, reconstructions and errors, side by side"}
    )
    shown: int = field(default=8, metadata={"help": "worst, and as many typical, pictures on the sheet"})

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "workers", "shown"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.subset_seed < 0:
            raise ValueError(f"--subset-seed must be at least 0, not {self.subset_seed}")
        if self.lpips_network not in LPIPS_TRUNKS:
            raise ValueError(f"--lpips-network must be one of {', '.join(LPIPS_TRUNKS)}, not {self.lpips_network!r}")


class Batch(NamedTuple):
    """originals, reconstructions: uint8 (B, H, W, 3), on the CPU.   codes: (B, L, K) int64."""

    originals: np.ndarray
    reconstructions: np.ndarray
    codes: np.ndarray


class ReconstructionDistance:
    """An observer: the Fréchet distance between originals and reconstructions, rFID for Inception's features."""

    def __init__(self, extractor: Extractor) -> None:
        self.name = f"r{extractor.frechet_name}"
        self._extractor = extractor
        self._originals, self._reconstructions = (GaussianStatistics(extractor.width) for _ in range(2))
        self._seen = 0

    def __call__(self, originals: np.ndarray, reconstructions: np.ndarray) -> None:
        for what, pixels, statistics in (
            ("originals", originals, self._originals),
            ("reconstructions", reconstructions, self._reconstructions),
        ):
            pool = self._extractor(pixels).pool
            check_finite(pool, what, self._seen)
            statistics.update(pool)
        self._seen += len(originals)

    def figures(self) -> dict[str, float]:
        """The distance under its name. ValueError for fewer than 2 pictures."""
        return {self.name: frechet_distance(self._reconstructions.gaussian(), self._originals.gaussian())}

    def warnings(self) -> list[str]:
        """What makes the distance other than it seems, one sentence each."""
        return rank_warnings(self.name, self._extractor.width, {"pictures": self._seen})


@torch.inference_mode()
def reconstruct(
    tokenizer: Tokenizer, settings: ReconstructionSettings, *, observers: Iterable[Observer] = ()
) -> dict[str, Any]:
    """Run pictures through a tokenizer once and measure what comes back; returns the figures as a JSON object.

    The tokenizer computes where its weights are. observers: called with every batch, for what needs both sets of
    pictures (the statistics of an rFID). Memory does not grow with the number of pictures, but for three numbers each.
    LPIPS is None, with the reason in `lpips_left_out`, where the weights of its network are not on disk.
    Pixels, and with them the figures, depend on the batch size by rounding only.
    Raises ValueError, in one line, for a source without pictures, a broken picture, or a tokenizer whose pixels are
    not finite.
    """
    tokenizer = tokenizer.eval()
    config, observers = tokenizer.config, list(observers)
    device = next(tokenizer.parameters()).device
    if settings.sheet:
        check_writable_file("--sheet", settings.sheet, (".png",))
    source = open_images(settings.images, crop=config.img_size, readers=settings.workers)
    indices = seeded_subset(source.count, settings.limit, settings.subset_seed)
    pixels_hash = hashlib.sha256()
    lpips, lpips_left_out = load_lpips(settings.lpips_network, device)
    counts = np.zeros((config.num_codebooks, config.codebook_size), dtype=np.int64)
    values: dict[str, list[np.ndarray]] = {"psnr_db": [], "ssim": [], "lpips": []}

    with tqdm(total=len(indices), desc="reconstructing", unit="picture", dynamic_ncols=True) as bar:
        for originals in source.chosen(indices.tolist(), settings.batch_size):
            pixels_hash.update(originals.tobytes())
            batch = _there_and_back(tokenizer, originals, device)
            for observe in observers:
                observe(batch.originals, batch.reconstructions)
            counts += count_codes(batch.codes, config.codebook_size)
            for name, value in _compare(batch, device, lpips).items():
                values[name].append(value.double().cpu().numpy())
            bar.update(len(originals))

    measured = {name: np.concatenate(parts) for name, parts in values.items() if parts}
    figures: dict[str, Any] = {
        "images": str(settings.images),
        "pictures": len(indices),
        "of_pictures": source.count,
        "pixels_hash": pixels_hash.hexdigest(),
        "subset_seed": settings.subset_seed if len(indices) < source.count else None,
        "img_size": config.img_size,
        "batch_size": settings.batch_size,
        "psnr_db": _summary(measured["psnr_db"], worst=np.min),
        "ssim": _summary(measured["ssim"], worst=np.min),
        "lpips": None,
        "codebooks": {"entries": config.codebook_size, **usage_figures(counts)},
        "definitions": DEFINITIONS,
    }
    if lpips:
        figures["lpips"] = {"network": settings.lpips_network, **_summary(measured["lpips"], worst=np.max)}
    else:
        figures["lpips_left_out"] = lpips_left_out
    if settings.sheet:
        chosen = worst_and_typical(measured["psnr_db"], settings.shown)
        again = source.chosen(sorted({int(indices[row]) for _, row in chosen}), settings.batch_size)
        shown = _by_index(sorted({row for _, row in chosen}), (_there_and_back(tokenizer, b, device) for b in again))
        write_sheet(
            settings.sheet,
            [
                (f"{kind}, {measured['psnr_db'][row]:.1f} dB: {source.name_of(indices[row])}", *shown[row])
                for kind, row in chosen
            ],
        )
        figures["sheet"] = str(settings.sheet)
    return figures


def worst_and_typical(psnr_db: np.ndarray, count: int) -> list[tuple[str, int]]:
    """("worst" or "typical", row) in turns: the `count` lowest rows, worst first, and the `count` nearest the median.

    No row is both; with fewer than 2 · count rows there are fewer of each.
    """
    count = min(count, (len(psnr_db) + 1) // 2)
    ranked = np.argsort(psnr_db, kind="stable")
    rest = ranked[count:]
    nearest = np.argsort(np.abs(psnr_db[rest] - np.median(psnr_db)), kind="stable")[:count]
    pairs = [[("worst", int(row)) for row in ranked[:count]], [("typical", int(row)) for row in rest[nearest]]]
    return [pair[i] for i in range(count) for pair in pairs if i < len(pair)]


def write_sheet(path: Path, rows: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Write one PNG of (label, original, reconstruction), uint8 (H, W, 3): each pair with its error map beside it."""
    sheet = labelled_grid(
        [
            (label, [Image.fromarray(picture) for picture in (original, image, error_map(original, image))])
            for label, original, image in rows
        ]
    )
    font = ImageFont.load_default(size=max(10, round(rows[0][1].shape[0] / 10)))
    text = (
        "each: original, reconstruction, largest error of a pixel's channels\n"
        f"error: black is 0, brightest is {ERROR_FULL_SCALE} of 255 or more"
    )
    draw = ImageDraw.Draw(sheet)
    height = math.ceil(draw.multiline_textbbox((0, 0), text, font=font)[3]) + 2 * GAP
    whole = Image.new("RGB", (sheet.width, sheet.height + height), BACKGROUND)
    whole.paste(sheet, (0, height))
    ImageDraw.Draw(whole).multiline_text((GAP, GAP), text, fill=INK, font=font)
    with replacing(path) as file:
        whole.save(file, format="PNG")


def error_map(original: np.ndarray, image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) twice → uint8 (H, W, 3): the largest difference of a pixel's channels, as a colour."""
    error = np.abs(original.astype(np.int16) - image).max(axis=2)
    colours = colormaps["inferno"](np.minimum(error / ERROR_FULL_SCALE, 1.0), bytes=True)
    return np.ascontiguousarray(colours[..., :3])


def _there_and_back(tokenizer: Tokenizer, originals: np.ndarray, device: torch.device) -> Batch:
    with explained_batch(len(originals)):
        codes = tokenizer.encode(to_unit(originals).to(device))
        images = tokenizer.decode(codes)
    if not bool(torch.isfinite(images).all()):
        raise ValueError("the tokenizer makes pixels that are not finite: its weights are damaged")
    return Batch(originals, to_uint8(images), codes.cpu().numpy())


def _compare(batch: Batch, device: torch.device, lpips: Callable[[Tensor, Tensor], Tensor] | None) -> dict[str, Tensor]:
    """Each measure of each picture, (B,)."""
    images, originals = (to_unit(pixels).to(device) for pixels in (batch.reconstructions, batch.originals))
    levels, original_levels = (
        torch.from_numpy(pixels).to(device).movedim(-1, 1) for pixels in (batch.reconstructions, batch.originals)
    )
    values = {"psnr_db": psnr(images, originals), "ssim": ssim(levels, original_levels)}
    if lpips:
        values["lpips"] = lpips(images, originals)
    return values


def _summary(values: np.ndarray, worst: Callable[[np.ndarray], Any]) -> dict[str, float]:
    return {"mean": float(values.mean()), "median": float(np.median(values)), "worst": float(worst(values))}


def _by_index(rows: list[int], batches: Iterator[Batch]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """The pictures of batches, which come in the order of `rows`, by row."""
    pairs = (pair for batch in batches for pair in zip(batch.originals, batch.reconstructions, strict=True))
    return dict(zip(rows, pairs, strict=True))
