"""Emoji in three drawing styles → folders of 128×128 pictures for training and for held-out figures.

    python demo/prepare_data.py [--out demo/data]

Fetches three npm packages (``npm pack``, about 150 MB; needs npm and a network) and writes

    train/0207/{google,twitter,fluent}.png     the 1,000 classes of demo/classes.tsv, 3,000 pictures
    heldout/<unicode name>/….png               852 other base emoji of the same three styles, 2,556 pictures

Licences of the pictures: Noto Emoji Apache 2.0, Twemoji CC-BY 4.0, Fluent Emoji MIT.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llamagen_unitok.runtime.flags import run_cli
from tokenizer.images import load_rgb

HERE = Path(__file__).resolve().parent
PICTURE_SIZE = 128

# style → (npm package, folder and file ending of its pictures inside the package)
STYLES = {
    "google": ("emoji-datasource-google@16.0.0", "img/google/64", ".png"),
    "twitter": ("emoji-datasource-twitter@16.0.0", "img/twitter/64", ".png"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "assets", ".webp"),
}


def read_classes(path: Path = HERE / "classes.tsv") -> list[dict[str, str]]:
    """Rows of classes.tsv in order of id: id, file, emoji, name, aliases, category, subcategory."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def fetch_packages(folder: Path) -> dict[str, Path]:
    """Download and unpack what is not there yet; returns the root folder of each style's package."""
    roots = {}
    for style, (package, *_) in STYLES.items():
        root = folder / style
        if not root.exists():
            print(f"fetching {package}", file=sys.stderr)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                packed = subprocess.run(
                    ["npm", "pack", package, "--silent"], cwd=folder, check=True, capture_output=True, text=True
                )
            except FileNotFoundError:
                raise ValueError("npm is not installed: it fetches the pictures (Debian: apt install npm)") from None
            except subprocess.CalledProcessError as error:
                reason = (error.stderr.strip().splitlines() or ["no message"])[-1]
                raise ValueError(f"npm could not fetch {package}: {reason}") from None
            archive = folder / packed.stdout.strip().splitlines()[-1]
            unfinished = folder / f"{style}.tmp"
            shutil.rmtree(unfinished, ignore_errors=True)
            with tarfile.open(archive) as tar:
                tar.extractall(unfinished, filter="data")
            unfinished.rename(root)
            archive.unlink()
        roots[style] = root / "package"
    return roots


def prepare(out: Path, packages: Path) -> tuple[int, int]:
    """Write all pictures under `out`; returns how many training and held-out emoji there are."""
    roots = fetch_packages(packages)
    sources = {style: roots[style] / STYLES[style][1] for style in STYLES}
    common = set.intersection(*({p.stem for p in sources[s].glob(f"*{STYLES[s][2]}")} for s in STYLES))
    classes = read_classes()
    in_classes = {Path(row["file"]).stem for row in classes}
    base = {Path(e["image"]).stem for e in json.loads((roots["google"] / "emoji.json").read_text(encoding="utf-8"))}
    heldout = sorted((base & common) - in_classes)
    wanted = [(f"train/{int(row['id']):04d}", Path(row["file"]).stem) for row in classes]
    wanted += [(f"heldout/{name}", name) for name in heldout]
    for folder, name in tqdm(wanted, desc="pictures", unit="emoji"):
        for style, source in sources.items():
            target = out / folder / f"{style}.png"
            if target.exists():
                continue
            picture = load_rgb(source / f"{name}{STYLES[style][2]}")
            target.parent.mkdir(parents=True, exist_ok=True)
            unfinished = target.with_suffix(".tmp")
            picture.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BICUBIC).save(unfinished, format="PNG")
            unfinished.rename(target)
    return len(classes), len(heldout)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fetch the emoji pictures and make the demo's data folder.")
    parser.add_argument("--out", type=Path, default=HERE / "data", help="where train/ and heldout/ go")
    parser.add_argument("--packages", type=Path, help="where the packages are unpacked (default: OUT/packages)")
    flags = parser.parse_args(argv)

    def body() -> None:
        trained, heldout = prepare(flags.out, flags.packages or flags.out / "packages")
        print(f"{flags.out}: {trained} classes and {heldout} held-out emoji in {len(STYLES)} styles")

    return run_cli(body)


if __name__ == "__main__":
    sys.exit(main())
