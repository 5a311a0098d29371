"""Images → code shards, resumable and by any number of processes."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llamagen_unitok.grid import labelled_grid
from llamagen_unitok.labels import ClassNames, check_classes
from llamagen_unitok.runtime.distributed import World
from llamagen_unitok.runtime.files import clear_unfinished, replacing
from llamagen_unitok.runtime.memory import explained_memory
from llamagen_unitok.training.data import (
    META_NAME,
    CodeMeta,
    CodeShards,
    is_sound_shard,
    left_out,
    read_meta,
    shard_name,
    usable_workers,
    write_meta,
    write_shard,
)
from llamagen_unitok.training.images import VIEWS, PictureViews, Views
from llamagen_unitok.training.sources import PictureSource, SourceOptions, fingerprint, open_source
from modelfolder import content_hash, file_hash
from tokenizer import Tokenizer
from tokenizer.images import psnr, to_pil, to_unit

JOB_NAME = "job.json"
INDEX_NAME = "index"  # folder of the headers of tar shards
VERIFY_NAME = "verify.png"
MOST_ENTRIES = 1 << 16  # of a codebook
MOST_NAMED = 10  # unreadable pictures in one error line
MOST_UNREADABLE = 1000  # of a process, before it gives up on a source


@dataclass(frozen=True)
class Extraction:
    """Settings of an extraction."""

    images: Path = field(
        metadata={
            "help": "a folder with one subfolder of pictures for each class, or tar (webdataset) or parquet files: a "
            "folder of them, or train-{0000..0145}.tar",
            "metavar": "SOURCE",
        }
    )
    views: str = field(default="centre", metadata={"help": "views of each picture", "choices": [*VIEWS]})
    crop_ranges: str = field(
        default="1.1",
        metadata={
            "help": "ten-crop: crops are cut from a square this many times as large; 1.1,1.05 gives the published two "
            "sets, twenty views",
            "metavar": "X,…",
        },
    )
    image_column: str = field(default="image", metadata={"help": "parquet: the column of pictures"})
    label_column: str = field(default="label", metadata={"help": "parquet: the column of classes; tar: entry of .json"})
    shard_size: int = field(default=20_000, metadata={"help": "pictures in a shard"})
    batch_size: int = field(
        default=64, metadata={"help": "pictures (each with all its views) in a batch; rounding may depend on it"}
    )
    dtype: str = field(
        default="fp32", metadata={"help": "of the encoder; the quantizer is fp32", "choices": ["fp32", "bf16"]}
    )
    workers: int = field(default=4, metadata={"help": "threads that read pictures, per process"})
    skip_unreadable: bool = field(
        default=False, metadata={"help": "leave pictures that cannot be read out, and list them in meta.json"}
    )
    verify: int = field(
        default=0, metadata={"help": f"decode this many random entries into OUT/{VERIFY_NAME}, beside the originals"}
    )

    def __post_init__(self) -> None:
        if self.views not in VIEWS:
            raise ValueError(f"--views must be one of {', '.join(VIEWS)}, not {self.views!r}")
        if self.dtype not in ("fp32", "bf16"):
            raise ValueError(f"--dtype must be fp32 or bf16, not {self.dtype!r}")
        for name, least in (("shard_size", 1), ("batch_size", 1), ("workers", 1), ("verify", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}")
        default = type(self).__dataclass_fields__["crop_ranges"].default
        if self.views != "ten-crop" and self.crop_ranges != default:
            raise ValueError(f"--crop-ranges {self.crop_ranges} is for --ten-crop; --views {self.views} has none")
        self.cuts()

    def cuts(self) -> Views:
        """The views of a picture. ValueError for crop ranges that are not numbers from 1 to 10."""
        try:
            ranges = [float(text) for text in self.crop_ranges.split(",")]
        except ValueError:
            ranges = []
        if not ranges or not all(1 <= crop_range <= 10 for crop_range in ranges):
            raise ValueError(f"--crop-ranges {self.crop_ranges} must be numbers from 1 to 10 with commas between them")
        return VIEWS[self.views](ranges)


def extract_codes(
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    settings: Extraction,
    *,
    out: Path,
    world: World,
    names: ClassNames | None = None,
    tokenizer_name: str | None = None,
) -> CodeShards:
    """Write the codes of all pictures of a source to `out`, and meta.json when they are complete.

    Process r writes the shards r, r + world, …; every batch has one shape, the last of a shard padded, so that a
    shard does not depend on the number of processes. An interrupted run goes on with the shards that are missing; a
    complete one is checked against its checksums, and only damaged shards are made again. A shard with pictures that
    cannot be read is not written, all others are; with `skip_unreadable` it lacks them, and meta.json lists them.
    names: what the labels mean, and the order that classes must have; default the source's own, else numbers.
    Raises ValueError, in one line, when `out` holds other codes, and for pictures that cannot be read.
    """
    config = tokenizer.config
    if config.codebook_size > MOST_ENTRIES:
        raise ValueError(f"codebooks of {config.codebook_size} entries do not fit the shards' uint16")
    options = SourceOptions(settings.image_column, settings.label_column, out / INDEX_NAME)
    source = open_source(settings.images, options, world)
    class_names = names_of_classes(source, names, settings.images)
    views = settings.cuts()
    total = len(source.labels)
    shards = [range(total)[i : i + settings.shard_size] for i in range(0, total, settings.shard_size)]
    count = len(shards)
    tokenizer_hash = content_hash(tokenizer_folder)

    def start() -> dict[str, str]:
        job = {
            "tokenizer_hash": tokenizer_hash,
            "views": views.names,
            "shard_size": settings.shard_size,
            "batch_size": settings.batch_size,
            "dtype": settings.dtype,
            "pictures": total,
            "pictures in their order, with labels and sizes": fingerprint(source),
        }
        return _start_or_continue(out, job)

    known = world.share_outcome(start)  # checksums of an earlier complete run
    tokenizer = tokenizer.to(world.device).eval()
    pictures = PictureViews(source, config.img_size, views)
    shape = (len(views.names), config.num_positions, config.num_codebooks)

    checksums = np.zeros((count, 64), dtype=np.uint8)  # hexadecimal digits; rows of other processes stay zero
    mine = range(world.rank, count, world.size)
    lacking: dict[int, str] = {}  # pictures that written shards lack → their names
    refused: dict[int, str] = {}  # pictures that keep a shard from being written → what is wrong
    with tqdm(
        total=sum(len(shards[i]) for i in mine), unit="picture", disable=not world.is_main, dynamic_ncols=True
    ) as bar:
        for index in mine:
            rows, path = shards[index], out / shard_name(index, count)
            without = left_out(path) if settings.skip_unreadable else []
            sound = is_sound_shard(path, (len(rows) - len(without), *shape))
            found = file_hash(path) if sound else None
            if found is None or found != known.get(path.name, found):
                if path.exists() and (settings.skip_unreadable or not left_out(path)):
                    tqdm.write(f"{path} is damaged: making it again", file=sys.stderr)
                codes, read, unreadable = _encoded(tokenizer, pictures, rows, shape, settings, world, bar)
                if unreadable and not (settings.skip_unreadable and read):
                    refused |= unreadable
                    if len(refused) >= MOST_UNREADABLE:
                        break
                    continue
                without = sorted(unreadable)
                found = file_hash(write_shard(out, index, count, codes, source.labels[read], without))
            else:
                bar.update(len(rows))
            lacking |= {number: source.name(number) for number in without}
            checksums[index] = np.frombuffer(found.encode(), dtype=np.uint8)
    lacking, refused = ({k: v for part in world.collect(p) for k, v in part.items()} for p in (lacking, refused))
    world.share_outcome(lambda: _check_readable(refused, settings))
    gathered = world.gather(checksums)
    if world.is_main:
        meta = CodeMeta(
            tokenizer=tokenizer_name or str(tokenizer_folder.name),
            tokenizer_hash=tokenizer_hash,
            img_size=config.img_size,
            grid=config.grid,
            num_codebooks=config.num_codebooks,
            codebook_size=config.codebook_size,
            views=views.names,
            class_names=class_names,
            shard_sizes=[len(rows) - len(lacking.keys() & set(rows)) for rows in shards],
            checksums=[row.tobytes().decode() for row in sum(gathered)],
            unreadable=[[number, lacking[number]] for number in sorted(lacking)],
        )
        write_meta(out, meta)
    world.barrier()
    return CodeShards(out)


def names_of_classes(source: PictureSource, names: ClassNames | None, images: Path) -> list[str]:
    """What the labels of a source mean: given names, else its own, else numbers.

    Raises ValueError, in one line, when there are labels without a name, or classes in another order than `names`.
    """
    highest = int(source.labels.max())
    if names is not None:
        if source.class_names is not None:
            check_classes(names, source.class_names, what="class of the pictures")
        class_names = names.names
    else:
        class_names = source.class_names or ClassNames.numbered(highest + 1).names
    if highest >= len(class_names):
        raise ValueError(f"--images {images} has label {highest}, but there are {len(class_names)} class names")
    return class_names


def _encoded(
    tokenizer: Tokenizer,
    pictures: PictureViews,
    rows: range,
    shape: tuple[int, int, int],
    settings: Extraction,
    world: World,
    bar: tqdm,
) -> tuple[np.ndarray, list[int], dict[int, str]]:
    """Codes uint16 (N, A, L, K) of the pictures that can be read, their numbers (N,), and what is wrong with the rest.

    shape: (A, L, K). Without `skip_unreadable` the codes end at the first that cannot be read: no shard will hold them.
    """
    codes = np.empty((len(rows), *shape), dtype=np.uint16)
    read: list[int] = []
    unreadable: dict[int, str] = {}
    for batch in pictures.batches(rows, settings.batch_size, usable_workers(settings.workers)):
        unreadable |= batch.unreadable
        if batch.rows and (settings.skip_unreadable or not unreadable):
            padded = batch.views + batch.views[-1:] * (settings.batch_size - len(batch.rows))
            encoded = encode_views(tokenizer, np.stack(padded), settings.dtype, world.device)[: len(batch.rows)]
            codes[len(read) : len(read) + len(encoded)] = encoded.cpu().numpy()
            read += batch.rows
        bar.update(len(batch.rows) + len(batch.unreadable))
    return codes[: len(read)], read, unreadable


def _check_readable(unreadable: dict[int, str], settings: Extraction) -> None:
    if not unreadable:
        return
    reasons = [unreadable[number] for number in sorted(unreadable)]
    shown = "; ".join(reasons[:MOST_NAMED])
    if len(reasons) > MOST_NAMED:
        shown += f"; and {len(reasons) - MOST_NAMED} more"
    remedy = "mend or leave them out with --skip-unreadable"
    if settings.skip_unreadable:
        remedy = "a shard must hold one readable picture at least: mend some, or give a larger --shard-size"
    raise ValueError(f"{shown}: {remedy}, and run this again; the other shards are kept")


def encode_views(tokenizer: Tokenizer, views: np.ndarray, dtype: str, device: torch.device) -> Tensor:
    """uint8 (B, A, H, W, 3) → codes (B, A, L, K) int64 on the device; dtype: "fp32", or "bf16" for the encoder only.

    Raises ValueError when the device has too little memory.
    """
    images = to_unit(torch.from_numpy(views).flatten(0, 1).to(device))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")
    with autocast, explained_memory(f"with {len(images)} views in a batch: use a smaller --batch-size"):
        return tokenizer.encode(images).unflatten(0, views.shape[:2])


@torch.no_grad()
def verify_codes(tokenizer: Tokenizer, shards: CodeShards, settings: Extraction, out: Path, seed: int = 0) -> float:
    """Decode random entries into OUT/verify.png, each beside its original; returns their mean PSNR in dB.

    Codes that do not belong to their pictures, or to this tokenizer, are seen at once. It reads the shards on disk and
    the pictures anew.
    """
    options = SourceOptions(settings.image_column, settings.label_column, out / INDEX_NAME)
    device = next(tokenizer.parameters()).device
    source = open_source(settings.images, options, World(0, 1, device))
    pictures = PictureViews(source, shards.meta.img_size, settings.cuts())
    numbers = np.delete(np.arange(len(source.labels)), [number for number, _ in shards.meta.unreadable])
    rng = np.random.default_rng(seed)
    groups, ratios = [], []
    for index in rng.choice(len(shards), size=min(settings.verify, len(shards)), replace=False):
        view = int(rng.integers(len(shards.meta.views)))
        label, codes = shards[int(index), view]
        original = to_unit(pictures[int(numbers[index])][view])[None]
        decoded = tokenizer.decode(torch.from_numpy(codes)[None].to(device)).cpu()
        ratios.append(psnr(decoded, original).item())
        groups.append((shards.meta.class_names[label], to_pil(torch.cat([original, decoded]))))
    with replacing(out / VERIFY_NAME) as file:
        labelled_grid(groups).save(file, format="PNG")
    return float(np.mean(ratios))


def _start_or_continue(out: Path, job: dict) -> dict[str, str]:
    """Note the job in an empty folder, else check that it is the same; checksums by name where codes are complete."""
    path = out / JOB_NAME
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write((json.dumps(job, indent=1) + "\n").encode())
        return {}
    clear_unfinished(out)
    try:
        earlier = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}, the note of what --out holds, is damaged ({error}): give an empty folder") from None
    if earlier != job:
        differing = ", ".join(sorted(k for k in job if earlier.get(k) != job[k]))
        raise ValueError(f"--out {out} holds codes of another job (other {differing}): give an empty folder")
    if not (out / META_NAME).exists():
        return {}
    checksums = read_meta(out).checksums
    return {shard_name(i, len(checksums)): value for i, value in enumerate(checksums)}
