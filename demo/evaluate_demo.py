"""Figures of the shipped emoji model: what is recognised, how varied it is, how well the tokenizer reconstructs.

    python demo/evaluate_demo.py [--checkpoint checkpoints/emoji] [--only recognised,psnr] [--json figures.json]

recognised  share of classes whose picture (index 0, seed 0) has its nearest real picture, of all classes and styles,
            in its own class; without guidance and at each scale of --cfg
styles      share of classes of which the pictures of 8 seeds (index 0) show at least 2 of the 3 styles; the style of a
            picture is that of its nearest real picture
psnr        mean over pictures of the tokenizer's PSNR in dB, on the training and on the held-out pictures
batches     share of pictures that are equal, pixel by pixel, at batch sizes 1 and 8 in fp32
Nearness is cosine similarity of EfficientNet-Lite0 features (demo/features.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from demo.features import (
    FeatureExtractor,
    Reference,
    load_reference,
    nearest,
    recognised,
    style,
)
from demo.prepare_data import STYLES
from llamagen_unitok.grid import labelled_grid
from llamagen_unitok.pipeline import ImageGenerator
from llamagen_unitok.runtime.files import check_writable_file, replacing
from llamagen_unitok.runtime.flags import Parser, run_cli
from tokenizer.images import load_rgb

PARTS = ("recognised", "styles", "psnr", "batches")
SEEDS = 8
BATCH_SIZES = (1, 8)
BATCH_CLASSES = 200  # classes of the comparison of batch sizes: one picture at a time is slow
SHOWN = 16  # samples of --nearest
NEIGHBOURS = 3  # real pictures beside each


class Evaluation:
    """A generator, the classes to look at, and the real pictures, whose features are read when first needed."""

    def __init__(
        self,
        generator: ImageGenerator,
        data: Path,
        work: Path,
        limit: int | None = None,
        batch_size: int = 50,
        temperature: float = 1.0,
    ):
        self.generator, self.data, self.work, self.batch_size = generator, data, work, batch_size
        self.temperature = temperature
        count = len(generator.names)
        self.labels = spread(range(count), limit or count)
        self.limit = limit
        self._features: dict[tuple[float, int], Tensor] = {}

    def prepare(self) -> None:
        """Load what pictures are compared with. ValueError when data or packages are missing."""
        self.extract = FeatureExtractor()
        cache = self.work / "reference_features.npz"
        self.reference: Reference = load_reference(self.extract, self.data, len(self.generator.names), cache)

    def pictures(self, cfg_scale: float, seed: int, labels: Iterable[int] | None = None):
        """One picture of each class, index 0, lazily."""
        labels = self.labels if labels is None else labels
        samples = self.generator.stream(
            labels,
            batch_size=self.batch_size,
            progress=True,
            cfg_scale=cfg_scale,
            seed=seed,
            temperature=self.temperature,
        )
        return (sample.picture for sample in samples)

    def features(self, cfg_scale: float, seed: int) -> Tensor:
        """Features of one picture of each class; computed once for each scale and seed."""
        if (cfg_scale, seed) not in self._features:
            print(f"pictures at cfg {cfg_scale:g}, seed {seed}", file=sys.stderr)
            self._features[cfg_scale, seed] = self.extract(self.pictures(cfg_scale, seed))
        return self._features[cfg_scale, seed]

    def recognised(self, scales: list[float]) -> dict:
        """Recognised share (seed 0) at 1.0 and at every scale; and the best."""
        shares = {}
        for scale in dict.fromkeys([1.0, *scales]):
            shares[f"{scale:g}"] = (
                recognised(self.features(scale, 0), self.labels, self.reference).double().mean().item()
            )
            print(f"recognised, cfg {scale:g}: {shares[f'{scale:g}']:.1%} of {len(self.labels)} classes", flush=True)
        best = max(shares, key=shares.__getitem__)
        print(f"recognised, best: {shares[best]:.1%} at cfg {best}")
        return {"classes": len(self.labels), "by_cfg": shares, "best_cfg": float(best), "best": shares[best]}

    def styles(self) -> dict:
        """Share of classes that show several styles over the seeds, without guidance; and each style's share."""
        styles = torch.stack([style(self.features(1.0, seed), self.reference) for seed in range(SEEDS)], dim=1)
        different = torch.tensor([row.unique().numel() for row in styles])
        result = {
            "classes": len(self.labels),
            "seeds": SEEDS,
            "at_least_2_styles": (different >= 2).double().mean().item(),
            "all_3_styles": (different >= 3).double().mean().item(),
            "share_of_style": {name: (styles == i).double().mean().item() for i, name in enumerate(STYLES)},
        }
        print(
            f"styles over {SEEDS} seeds, cfg 1: at least 2 of 3 in {result['at_least_2_styles']:.1%} of "
            f"{len(self.labels)} classes, all 3 in {result['all_3_styles']:.1%}; "
            + ", ".join(f"{name} {share:.0%}" for name, share in result["share_of_style"].items())
        )
        return result

    def psnr(self) -> dict:
        """The tokenizer's PSNR on training pictures and on held-out ones."""
        try:
            from llamagen_unitok.evaluation.reconstruction import ReconstructionSettings, reconstruct
        except ImportError:
            raise ValueError("the figures of the tokenizer need more packages: pip install -e '.[eval]'") from None
        result = {}
        for name, folder in (("training", self.data / "train"), ("heldout", self.data / "heldout")):
            if not folder.is_dir():
                raise ValueError(f"{folder} is missing: python demo/prepare_data.py makes the data")
            figures = reconstruct(self.generator.tokenizer, ReconstructionSettings(folder, limit=self.limit))
            mean, worst = figures["psnr_db"]["mean"], figures["psnr_db"]["worst"]
            result[name] = {"pictures": figures["pictures"], "mean_db": mean, "worst_db": worst}
            print(f"psnr, {name}: {mean:.2f} dB mean over {figures['pictures']} pictures, worst {worst:.2f} dB")
        return result

    def batches(self) -> dict:
        """Share of equal pictures between two batch sizes, seed 0, no guidance."""
        labels = spread(self.labels, BATCH_CLASSES)
        drawn = []
        for size in BATCH_SIZES:
            samples = self.generator.stream(
                labels, batch_size=size, progress=True, seed=0, temperature=self.temperature
            )
            drawn.append([np.asarray(sample.picture) for sample in samples])
        equal = float(np.mean([np.array_equal(a, b) for a, b in zip(*drawn, strict=True)]))
        print(f"batch sizes {BATCH_SIZES[0]} and {BATCH_SIZES[1]}, fp32: {equal:.1%} of {len(labels)} pictures equal")
        return {"pictures": len(labels), "batch_sizes": list(BATCH_SIZES), "equal": equal}

    def nearest_sheet(self, path: Path) -> None:
        """Write samples (seed 0, no guidance), each followed by its nearest training pictures, as one PNG."""
        labels = spread(self.labels, SHOWN)
        pictures = list(self.pictures(1.0, 0, labels))
        neighbours = nearest(self.extract(pictures), self.reference, NEIGHBOURS)
        paths = [path for styles in self.reference.paths for path in styles]
        groups = [
            (
                f"{label} {self.generator.names[label]}: sample, then nearest",
                [picture, *(load_rgb(paths[i]) for i in row)],
            )
            for label, picture, row in zip(labels, pictures, neighbours.tolist(), strict=True)
        ]
        with replacing(path) as file:
            labelled_grid(groups).save(file, format="PNG")
        print(path)


def spread(items, count: int) -> list:
    """Up to `count` of the items, evenly spread."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def scales_from(text: str) -> list[float]:
    """``1,1.5,2`` → numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers with commas between them") from None


def parts_from(text: str) -> list[str]:
    """``recognised,psnr`` → names of parts."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"there is no part {part!r}: choose from {', '.join(PARTS)}")
    return parts


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__.partition("\n\n")[0], epilog=__doc__.partition("\n\n")[2].partition("\n\n")[2])
    parser.add_argument("--checkpoint", default=str(ROOT / "checkpoints" / "emoji"), metavar="BUNDLE")
    parser.add_argument("--data", type=Path, default=HERE / "data", metavar="DIR", help="of demo/prepare_data.py")
    parser.add_argument(
        "--work", type=Path, default=HERE / "work", metavar="DIR", help="keeps features of real pictures"
    )
    parser.add_argument("--only", type=parts_from, default=list(PARTS), metavar="LIST", help=f"of {','.join(PARTS)}")
    parser.add_argument(
        "--cfg", type=scales_from, default=[1.5, 2.0, 3.0], metavar="LIST", help="scales beside 1 (default 1.5,2,3)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, metavar="X", help="of the samples (default 1)")
    parser.add_argument("--limit", type=int, metavar="N", help="only N classes and N pictures, for a quick look")
    parser.add_argument("--batch-size", type=int, default=50, metavar="N", help="pictures at a time (default 50)")
    parser.add_argument("--device", default="auto", help="of the generator: auto, cpu or cuda")
    parser.add_argument("--nearest", type=Path, metavar="PNG", help="write samples beside nearest training pictures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    flags = parser.parse_args(argv)

    def body() -> None:
        for name, path, ending in (("--nearest", flags.nearest, ".png"), ("--json", flags.json, ".json")):
            if path:
                check_writable_file(name, path, (ending,))
        if flags.limit is not None and flags.limit < 1:
            raise ValueError(f"--limit must be a whole number of at least 1, got {flags.limit}")
        generator = ImageGenerator.from_pretrained(flags.checkpoint, device=flags.device, dtype="fp32")
        evaluation = Evaluation(generator, flags.data, flags.work, flags.limit, flags.batch_size, flags.temperature)
        if flags.nearest or {"recognised", "styles"} & set(flags.only):
            evaluation.prepare()
        measure = {
            "recognised": lambda: evaluation.recognised(flags.cfg),
            "styles": evaluation.styles,
            "psnr": evaluation.psnr,
            "batches": evaluation.batches,
        }
        started = time.perf_counter()
        figures = {part: measure[part]() for part in PARTS if part in flags.only}
        if flags.nearest:
            evaluation.nearest_sheet(flags.nearest)
        if flags.json:
            with replacing(flags.json) as file:
                file.write((json.dumps(figures, indent=2) + "\n").encode())
            print(flags.json)
        print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)

    return run_cli(body)


if __name__ == "__main__":
    sys.exit(main())
