#!/usr/bin/env python
"""Class labels → pictures.

python sample.py --class 207 --cfg 1.0
python sample.py --class "zebra face",dog --num 8 --cfg 2 --seed 1 --out zebras-and-dogs.png
"""

import re
import sys
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llamagen_unitok.grid import labelled_grid
from llamagen_unitok.labels import ClassNames
from llamagen_unitok.pipeline import BATCH_SIZE, DTYPES, ImageGenerator, Sample
from llamagen_unitok.runtime.files import check_writable_file, check_writable_folder, replacing
from llamagen_unitok.runtime.flags import Parser, add_flags, run_cli, settings_from
from llamagen_unitok.sampling import SamplingConfig
from modelfolder import locate

SHIPPED = Path(__file__).resolve().parent / "checkpoints" / "emoji"
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
NAMED_CLASSES = 3  # in a default file name


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    flags = parser.parse_args(argv)
    return run_cli(lambda: list_classes(flags) if flags.list_classes else sample(flags))


def build_parser() -> Parser:
    parser = Parser(
        "Draw pictures of classes. The same flags give the same pictures, on the same device and batch size.",
        usage="sample.py --class LIST [--num N] [--cfg X] [--seed N] [--out PICTURE.png] [more flags below]",
        epilog='examples:  sample.py --class 207    sample.py --class "zebra face",dog --num 8 --cfg 2',
    )
    what = parser.add_argument_group("what to draw")
    what.add_argument("--class", dest="classes", metavar="LIST", help="ids, names or emoji, with commas between them")
    what.add_argument("--num", type=int, default=4, metavar="N", help="pictures of each class (default 4)")
    what.add_argument("--list-classes", action="store_true", help="print ids and names, and draw nothing")
    add_flags(parser.add_argument_group("how to sample"), SamplingConfig)
    model = parser.add_argument_group("with which model, and where")
    model.add_argument("--checkpoint", metavar="DIR_OR_HUB_ID", help="a bundle (default: the shipped emoji model)")
    model.add_argument("--tokenizer", metavar="DIR_OR_HUB_ID", help="a tokenizer, if not the bundle's own")
    model.add_argument("--device", default="auto", help="auto, cpu or cuda; auto is cuda if there is one")
    model.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="auto is fp32 on cpu, bf16 on cuda")
    model.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE, metavar="N", help=f"pictures at a time (default {BATCH_SIZE})"
    )
    output = parser.add_argument_group("what to write")
    output.add_argument(
        "--out", type=Path, metavar="PICTURE", help="one labelled sheet of all (default CLASS-cfgX-seedN.png here)"
    )
    output.add_argument("--save-images", type=Path, metavar="DIR", help="each picture as a PNG file, and no sheet")
    output.add_argument("--npz", type=Path, metavar="FILE", help="arr_0 (uint8, NHWC, 0-255) and label, and no sheet")
    return parser


def list_classes(flags) -> None:
    """Print one line a class: id, tab, name."""
    folder = locate(flags.checkpoint or SHIPPED)
    names = ClassNames.load(folder)
    if names is None:
        raise ValueError(f"{folder} has no labels.json, so its classes have no names")
    for label, name in enumerate(names.names):
        print(f"{label}\t{name}")


def sample(flags) -> None:
    """Check everything, then draw, then write."""
    config = settings_from(SamplingConfig, flags)
    if flags.classes is None:
        raise ValueError("--class is missing: give ids or names, as in --class 207 or --class dog")
    if flags.npz:
        check_writable_file("--npz", flags.npz, (".npz",))
    if flags.save_images:
        check_writable_folder("--save-images", flags.save_images)
    if flags.out:
        check_writable_file("--out", flags.out, PICTURE_ENDINGS)
    folder = locate(flags.checkpoint or SHIPPED)
    names = ClassNames.load(folder)
    if names:
        names.parse(flags.classes)  # a wrong name is found before the weights are read
    generator = ImageGenerator.from_pretrained(folder, flags.tokenizer, flags.device, flags.dtype)
    names = generator.names
    labels = names.parse(flags.classes)
    run_name = f"cfg{config.cfg_scale:g}-seed{config.seed}"
    sheet = flags.out
    if sheet is None and not flags.save_images and not flags.npz:
        sheet = Path(f"{_classes_name(names, labels)}-{run_name}.png")
        check_writable_file("--out", sheet, PICTURE_ENDINGS)

    started = time.perf_counter()
    samples = generator.stream(labels, flags.num, batch_size=flags.batch_size, progress=True, **vars(config))
    if flags.save_images:
        samples = saved_one_by_one(samples, names, flags.save_images, run_name)
    if sheet or flags.npz:
        drawn = list(samples)
        count = len(drawn)
    else:
        count = sum(1 for _ in samples)
    seconds = time.perf_counter() - started

    if sheet:
        groups: dict[int, list] = {}
        for label, _, picture, _ in drawn:
            groups.setdefault(label, []).append(picture)
        with replacing(sheet) as file:
            grid = labelled_grid([(f"{label} {names[label]}", pictures) for label, pictures in groups.items()])
            grid.save(file, format={".png": "PNG", ".webp": "WEBP"}.get(sheet.suffix.lower(), "JPEG"))
        print(sheet)
    if flags.npz:
        pixels = np.stack([np.asarray(one.picture) for one in drawn])
        with replacing(flags.npz) as file:
            np.savez(file, arr_0=pixels, label=np.array([one.label for one in drawn], dtype=np.int64))
        print(flags.npz)
    if flags.save_images:
        print(flags.save_images)
    print(f"{count} pictures in {seconds:.2f} s ({count / seconds:.2f} images/s)")


def saved_one_by_one(samples: Iterator[Sample], names: ClassNames, folder: Path, run_name: str) -> Iterator[Sample]:
    """Pass samples on, each written as DIR/ID-NAME-cfgX-seedN-INDEX.png."""
    folder.mkdir(exist_ok=True)
    for one in samples:
        name = f"{one.label:04d}-{_slug(names[one.label])}-{run_name}-{one.index:05d}.png"
        with replacing(folder / name) as file:
            one.picture.save(file, format="PNG")
        yield one


def _classes_name(names: ClassNames, labels: list[int]) -> str:
    """The classes as part of a file name: pig, pig-dog, pig-dog-cat-and-5-more."""
    different = list(dict.fromkeys(labels))
    shown = "-".join(_slug(names[label]) for label in different[:NAMED_CLASSES])
    rest = len(different) - NAMED_CLASSES
    return f"{shown}-and-{rest}-more" if rest > 0 else shown


def _slug(name: str) -> str:
    """Letters, digits and dashes that every file system takes, at most 60."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60] or "class"


if __name__ == "__main__":
    sys.exit(main())
