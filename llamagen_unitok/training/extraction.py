"""Images → code shards, resumable and by any number of processes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from llamagen_unitok.runtime.distributed import World
from llamagen_unitok.runtime.files import replacing
from llamagen_unitok.training.data import (
    CodeMeta,
    CodeShards,
    checksum,
    shard_name,
    usable_workers,
    write_meta,
    write_shard,
)
from llamagen_unitok.training.images import VIEWS, PictureViews
from modelfolder import content_hash
from tokenizer import UniTok

JOB_NAME = "job.json"


@dataclass(frozen=True)
class Extraction:
    """Settings of an extraction."""

    images: Path = field(metadata={"help": "folder with one subfolder of pictures for each class"})
    views: str = field(default="centre", metadata={"help": f"views of each picture: {', '.join(VIEWS)}"})
    shard_size: int = field(default=20_000, metadata={"help": "pictures in a shard"})
    batch_size: int = field(default=64, metadata={"help": "pictures (each with all its views) in a batch"})
    workers: int = field(default=4, metadata={"help": "data-loading processes per process"})

    def __post_init__(self) -> None:
        if self.views not in VIEWS:
            raise ValueError(f"--views must be one of {', '.join(VIEWS)}, not {self.views!r}")
        for name in ("shard_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")


def extract_codes(
    tokenizer: UniTok,
    tokenizer_folder: Path,
    settings: Extraction,
    *,
    out: Path,
    world: World,
    class_names: list[str] | None = None,
    tokenizer_name: str | None = None,
) -> CodeShards:
    """Write the codes of all pictures of a folder to `out`; shards that an interrupted run left are kept.

    Process r writes the shards r, r + world, …; the main process then writes meta.json. class_names: by label;
    default the names of the subfolders. Raises ValueError when `out` holds other codes.
    """
    config = tokenizer.config
    pictures = PictureViews(settings.images, config.img_size, settings.views)
    folders = pictures.pictures.classes
    if class_names is not None and len(class_names) != len(folders):
        raise ValueError(f"{len(class_names)} class names, but {settings.images} has {len(folders)} subfolders")
    shards = [range(len(pictures))[i : i + settings.shard_size] for i in range(0, len(pictures), settings.shard_size)]
    count = len(shards)
    job = {
        "tokenizer_hash": content_hash(tokenizer_folder),
        "views": settings.views,
        "shard_size": settings.shard_size,
        "pictures": len(pictures),
    }
    _start_or_continue(out, job, world)
    tokenizer = tokenizer.to(world.device).eval()

    mine = [i for i in range(world.rank, count, world.size) if not (out / shard_name(i, count)).exists()]
    total = sum(len(shards[i]) for i in mine)
    with tqdm(total=total, desc="pictures", unit="picture", disable=not world.is_main, dynamic_ncols=True) as bar:
        for index in mine:
            codes, labels = _encode_rows(tokenizer, pictures, shards[index], settings, world, bar)
            write_shard(out, index, count, codes, labels)
    world.barrier()
    if world.is_main:
        paths = [out / shard_name(i, count) for i in range(count)]
        meta = CodeMeta(
            tokenizer=tokenizer_name or str(tokenizer_folder.name),
            tokenizer_hash=job["tokenizer_hash"],
            img_size=config.img_size,
            grid=config.grid,
            num_codebooks=config.num_codebooks,
            codebook_size=config.codebook_size,
            views=VIEWS[settings.views][0],
            class_names=class_names or folders,
            shard_sizes=[len(rows) for rows in shards],
            checksums=[checksum(path) for path in paths],
        )
        write_meta(out, meta)
    world.barrier()
    return CodeShards(out)


def _encode_rows(
    tokenizer: UniTok, pictures: PictureViews, rows: range, settings: Extraction, world: World, bar: tqdm
) -> tuple[np.ndarray, np.ndarray]:
    """codes (N, A, L, K) and labels (N,) of some pictures."""
    loader = DataLoader(
        Subset(pictures, rows),
        batch_size=settings.batch_size,
        num_workers=usable_workers(settings.workers),
        pin_memory=world.device.type == "cuda",
    )
    codes, labels = [], []
    for images, label in loader:  # (B, A, 3, H, W), (B,)
        flat = tokenizer.encode(images.flatten(0, 1).to(world.device, non_blocking=True))  # (B·A, L, K)
        codes.append(flat.unflatten(0, images.shape[:2]).cpu().numpy())
        labels.append(label.numpy())
        bar.update(len(label))
    return np.concatenate(codes), np.concatenate(labels)


def _start_or_continue(out: Path, job: dict, world: World) -> None:
    path = out / JOB_NAME
    if path.exists():
        earlier = json.loads(path.read_text())
        if earlier != job:
            differing = ", ".join(sorted(k for k in job if earlier.get(k) != job[k]))
            raise ValueError(f"--out {out} holds codes of another job (other {differing}): give an empty folder")
    elif world.is_main:
        out.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write((json.dumps(job, indent=1) + "\n").encode())
    world.barrier()
