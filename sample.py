#!/usr/bin/env python
"""Class labels → pictures.

python sample.py --class 207 --cfg 1.0
python sample.py --class "zebra face",dog --num 8 --cfg 2 --seed 1 --out zebras-and-dogs.png
torchrun --nproc-per-node 8 sample.py --num-samples 50000 --npz samples.npz
"""

import dataclasses
import re
import sys
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from llamagen_unitok.evaluation.presets import PRESETS, apply_preset
from llamagen_unitok.evaluation.provenance import model_record
from llamagen_unitok.evaluation.samples import (
    LABEL_SCHEMES,
    SampleRun,
    recorded_batch_size,
    run_samples,
    sample_record,
)
from llamagen_unitok.grid import labelled_grid
from llamagen_unitok.labels import ClassNames
from llamagen_unitok.pipeline import BATCH_SIZE, DECODERS, DTYPES, ImageGenerator, Sample
from llamagen_unitok.published.cache import locate_model
from llamagen_unitok.runtime.distributed import processes
from llamagen_unitok.runtime.files import check_writable_file, check_writable_folder, replacing
from llamagen_unitok.runtime.flags import Parser, add_flags, given_flags, run_cli, settings_from
from llamagen_unitok.sampling import ENGINES, SamplingConfig, engine_name
from llamagen_unitok.sampling.batches import number_or_auto, propose_batch_size
from tokenizer.images import Resize

SHIPPED = Path(__file__).resolve().parent / "checkpoints" / "emoji"
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
NAMED_CLASSES = 3  # in a default file name


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    flags = parser.parse_args(argv)

    def body() -> None:
        if flags.threads is not None:
            if flags.threads < 1:
                raise ValueError(f"--threads must be a whole number of at least 1, got {flags.threads}")
            torch.set_num_threads(flags.threads)
        given = given_flags(parser, argv)
        if flags.preset:
            apply_preset(flags.preset, flags, given)
        if flags.num_samples is None and "labels" in given:
            raise ValueError("--labels is for a large run: give --num-samples as well, or leave it out")
        if flags.num_samples is not None and "num" in given:
            raise ValueError("--num counts pictures of each class, --num-samples those of all: leave one of them out")
        if flags.list_classes:
            list_classes(flags)
        elif flags.num_samples is not None:
            sample_many(flags)
        else:
            sample(flags)

    return run_cli(body)


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
    model.add_argument("--checkpoint", metavar="DIR_OR_ID", help="a bundle (default: emoji) or llamagen-b-256 …")
    model.add_argument("--tokenizer", metavar="DIR_OR_ID", help="a tokenizer, if not the bundle's own; or unitok-large")
    model.add_argument("--device", default="auto", help="auto, cpu or cuda; auto is cuda if there is one")
    model.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        metavar="NAME",
        help="auto (fp32 on cpu, bf16 on cuda), fp32, bf16 or fp16",
    )
    model.add_argument(
        "--engine",
        default="auto",
        choices=["auto", *ENGINES],
        metavar="NAME",
        help=f"auto or {', '.join(ENGINES)}; see docs/benchmarks.md",
    )
    model.add_argument(
        "--decoder",
        default="plain",
        choices=DECODERS,
        metavar="NAME",
        help="plain, fast (the same up to rounding), bf16 (faster), or compiled (bf16 too)",
    )
    model.add_argument(
        "--batch-size",
        type=number_or_auto,
        metavar="N",
        help=f"pictures at a time (default {BATCH_SIZE}; {SampleRun.batch_size} in a large run), or auto",
    )
    model.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: as many as torch takes)")
    output = parser.add_argument_group("what to write")
    output.add_argument("--resize", metavar="N[:bicubic]", help="side in pixels, by area, or as LlamaGen: bicubic")
    output.add_argument(
        "--out", type=Path, metavar="PICTURE", help="one labelled sheet of all (default CLASS-cfgX-seedN.png here)"
    )
    output.add_argument("--save-images", type=Path, metavar="DIR", help="each picture as a PNG file, and no sheet")
    output.add_argument("--npz", type=Path, metavar="FILE", help="arr_0 (uint8, NHWC, 0-255) and label, and no sheet")
    many = parser.add_argument_group(
        "a large run for figures, into --npz; stopped, it goes on when it is started again"
    )
    many.add_argument("--num-samples", type=int, metavar="N", help="pictures over all classes (or those of --class)")
    many.add_argument(
        "--labels", default=SampleRun.labels, choices=LABEL_SCHEMES, help="as many of each class, or drawn"
    )
    many.add_argument(
        "--preset",
        metavar="NAME",
        help=f"a published table row, with random labels: {', '.join(list(PRESETS)[:2])} …",
    )
    return parser


def batch_size_for(flags, generator: ImageGenerator, usual: int, pictures: int, earlier: int | None = None) -> int:
    """What --batch-size means for this generator and so many pictures; `usual` where it is not given.

    auto is that of the run that is gone on with (`earlier`), since no other gives its codes; else a proposal. Printed.
    """
    if flags.batch_size != "auto":
        return usual if flags.batch_size is None else flags.batch_size
    guided = flags.cfg_scale != 1
    size = earlier or propose_batch_size(generator.gpt, guided=guided, pictures=pictures)
    print(f"batch size {size}")
    return size


def list_classes(flags) -> None:
    """Print one line a class: id, tab, name."""
    folder = locate_model(flags.checkpoint or SHIPPED, flags.device)
    names = ClassNames.load(folder)
    if names is None:
        raise ValueError(f"{folder} has no labels.json, so its classes have no names")
    for label, name in enumerate(names.names):
        print(f"{label}\t{name}")


def sample_many(flags) -> None:
    """A large run: labels by scheme, one .npz, any number of processes."""
    config = settings_from(SamplingConfig, flags)
    resize = Resize.parse(flags.resize) if flags.resize is not None else None
    fixed = flags.batch_size if isinstance(flags.batch_size, int) else SampleRun.batch_size
    run = SampleRun(flags.num_samples, flags.labels, fixed)
    if not flags.npz:
        raise ValueError("--num-samples writes an .npz: give --npz FILE")
    if flags.out or flags.save_images:
        raise ValueError("--num-samples writes an .npz only: leave out --out and --save-images")
    check_writable_file("--npz", flags.npz, (".npz",))
    folder = locate_model(flags.checkpoint or SHIPPED, flags.device)
    tokenizer = locate_model(flags.tokenizer) if flags.tokenizer else None
    with processes(flags.device) as world:
        generator = ImageGenerator.from_pretrained(folder, tokenizer, world.device, flags.dtype)
        generator.resize = resize
        generator.use_decoder(flags.decoder)
        config.check_generator(generator.gpt.config)
        # One shape for all processes and for a resumed run: the main process proposes it.
        size = world.share_outcome(
            lambda: batch_size_for(
                flags, generator, run.batch_size, run.num_samples, earlier=recorded_batch_size(flags.npz)
            )
        )
        run = dataclasses.replace(run, batch_size=size)
        classes = generator.names.parse(flags.classes) if flags.classes is not None else None
        record = sample_record(
            generator,
            model_record(folder, tokenizer),
            run,
            config,
            classes=classes,
            engine=flags.engine,
            preset=flags.preset,
        )
        started = time.perf_counter()
        made = run_samples(generator, record, flags.npz, world)
        seconds = time.perf_counter() - started
        if world.is_main:
            print(flags.npz)
            print(f"{made} pictures made by process 0 in {seconds:.2f} s ({made / seconds:.2f} images/s)")


def sample(flags) -> None:
    """Check everything, then draw, then write."""
    config = settings_from(SamplingConfig, flags)
    resize = Resize.parse(flags.resize) if flags.resize is not None else None
    if flags.classes is None:
        raise ValueError("--class is missing: give ids or names, as in --class 207 or --class dog")
    if flags.npz:
        check_writable_file("--npz", flags.npz, (".npz",))
    if flags.save_images:
        check_writable_folder("--save-images", flags.save_images)
    if flags.out:
        check_writable_file("--out", flags.out, PICTURE_ENDINGS)
    folder = locate_model(flags.checkpoint or SHIPPED)
    names = ClassNames.load(folder)
    if names:
        names.parse(flags.classes)  # a wrong name is found before the weights are read
    tokenizer = locate_model(flags.tokenizer) if flags.tokenizer else None
    generator = ImageGenerator.from_pretrained(folder, tokenizer, flags.device, flags.dtype)
    generator.resize = resize
    generator.use_decoder(flags.decoder)
    names = generator.names
    labels = names.parse(flags.classes)
    run_name = _run_name(config)
    sheet = flags.out
    if sheet is None and not flags.save_images and not flags.npz:
        sheet = Path(f"{_classes_name(names, labels)}-{run_name}.png")
        check_writable_file("--out", sheet, PICTURE_ENDINGS)

    batch_size = batch_size_for(flags, generator, BATCH_SIZE, max(1, len(labels) * flags.num))
    # Which may build native code, once: not a part of what is timed.
    engine = engine_name(flags.engine, generator.gpt.norm.weight.device.type)
    started = time.perf_counter()
    samples = generator.stream(labels, flags.num, batch_size=batch_size, progress=True, engine=engine, **vars(config))
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


def _run_name(config: SamplingConfig) -> str:
    """Guidance and seed as part of a file name, and the settings that are not the usual ones: cfg2-seed0-top-k50."""
    others = [
        f"-{field.metadata['flag'].strip('-')}{value}"
        for field in dataclasses.fields(config)
        if field.name not in ("cfg_scale", "seed") and (value := getattr(config, field.name)) != field.default
    ]
    return f"cfg{config.cfg_scale:g}-seed{config.seed}{''.join(others)}"


def _slug(name: str) -> str:
    """Letters, digits and dashes that every file system takes, at most 60."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60] or "class"


if __name__ == "__main__":
    sys.exit(main())
