"""Code shards on disk, and the order in which training reads anything.

meta.json                                   who made the codes, shapes, class names, a checksum per shard
shard-00000-of-00064.safetensors            codes uint16 (N, A, L, K), A augmented views; labels int64 (N,)
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save as safetensors_bytes
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from llamagen_unitok.runtime.distributed import World
from llamagen_unitok.runtime.files import replacing
from modelfolder import file_hash

META_NAME = "meta.json"
FORMAT = "llamagen-unitok codes 1"
VERIFY_THREADS = 8
MOST_NAMED = 5  # damaged shards in one error line
LEFT_OUT = "left out"  # entry of a shard's header


def shard_name(index: int, count: int) -> str:
    """File name of shard `index` of `count`."""
    return f"shard-{index:05d}-of-{count:05d}.safetensors"


@dataclass(frozen=True)
class CodeMeta:
    """What meta.json holds. `tokenizer_hash` is modelfolder.content_hash of the tokenizer that made the codes.

    unreadable: pictures of the source that were left out: [number in its order, name].
    """

    tokenizer: str
    tokenizer_hash: str
    img_size: int
    grid: int
    num_codebooks: int
    codebook_size: int
    views: list[str]
    class_names: list[str]
    shard_sizes: list[int]
    checksums: list[str]
    format: str = FORMAT
    unreadable: list[list[Any]] = field(default_factory=list)

    @property
    def num_positions(self) -> int:
        """L: cells of the grid."""
        return self.grid**2

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the shards' checksums: which codes these are."""
        return hashlib.sha256("".join(self.checksums).encode()).hexdigest()


def write_shard(
    folder: Path, index: int, count: int, codes: np.ndarray, labels: np.ndarray, left_out: Sequence[int] = ()
) -> Path:
    """Write one shard, complete or not at all. codes: (N, A, L, K) in [0, 65535]; labels: (N,).

    left_out: numbers, in the source's order, of the pictures that it lacks; kept in its header.
    """
    if codes.min(initial=0) < 0 or codes.max(initial=0) > np.iinfo(np.uint16).max:
        raise ValueError(f"codes from {codes.min()} to {codes.max()} do not fit uint16")
    # safetensors writes an array's memory as it lies, so it must be in row-major order
    arrays = {"codes": (codes, np.uint16), "labels": (labels, np.int64)}
    note = {LEFT_OUT: json.dumps([int(number) for number in left_out])} if len(left_out) else None
    data = safetensors_bytes(
        {name: np.ascontiguousarray(array, dtype) for name, (array, dtype) in arrays.items()}, metadata=note
    )
    return _write_atomically(folder / shard_name(index, count), data)


def write_meta(folder: Path, meta: CodeMeta) -> Path:
    """Write meta.json; with it the folder counts as complete."""
    return _write_atomically(folder / META_NAME, (json.dumps(asdict(meta), indent=1) + "\n").encode())


def _write_atomically(path: Path, data: bytes) -> Path:
    with replacing(path) as file:
        file.write(data)
    return path


class CodeShards:
    """Memory-mapped shards as one sequence: ``shards[i, view]`` → (label, codes (L, K) int64).

    Opening checks that every shard is there, has its full length and the shapes of meta.json, and raises ValueError
    that names the files otherwise; checksums are read by `verify` only. A copy in another process maps the files anew.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        count = len(self.meta.shard_sizes)
        self.paths = [self.folder / shard_name(i, count) for i in range(count)]
        self._starts = [0, *accumulate(self.meta.shard_sizes)]
        shape = (len(self.meta.views), self.meta.num_positions, self.meta.num_codebooks)
        self._maps, problems = [], []
        for path, size in zip(self.paths, self.meta.shard_sizes, strict=True):
            try:
                self._maps.append(_map_shard(path, (size, *shape)))
            except ValueError as error:
                problems.append(str(error))
        _raise_any(problems)

    def __reduce__(self) -> tuple[type[CodeShards], tuple[Path]]:
        return CodeShards, (self.folder,)  # a pickled memory map would be all the codes

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, item: tuple[int, int]) -> tuple[int, np.ndarray]:
        index, view = item
        shard = bisect.bisect_right(self._starts, index) - 1
        codes, labels = self._maps[shard]
        row = index - self._starts[shard]
        return int(labels[row]), codes[row, view].astype(np.int64)

    def entries(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Labels (n,) int64 and codes (n, A, L, K) uint16 of these entries, with all their views."""
        labels = np.empty(len(indices), dtype=np.int64)
        meta = self.meta
        codes = np.empty((len(indices), len(meta.views), meta.num_positions, meta.num_codebooks), dtype=np.uint16)
        for row, index in enumerate(indices):
            shard = bisect.bisect_right(self._starts, index) - 1
            shard_codes, shard_labels = self._maps[shard]
            codes[row] = shard_codes[index - self._starts[shard]]
            labels[row] = shard_labels[index - self._starts[shard]]
        return labels, codes

    def labels(self) -> np.ndarray:
        """(N,) int64, all labels."""
        return np.concatenate([labels for _, labels in self._maps])

    def verify(self) -> None:
        """Read every byte: ValueError names all shards whose checksum, codes or labels are not what meta.json says."""
        with ThreadPoolExecutor(usable_workers(VERIFY_THREADS)) as pool:
            found = pool.map(self._problem, range(len(self.paths)))
            problems = list(tqdm(found, total=len(self.paths), desc="checking shards", unit="shard", delay=2))
        _raise_any([problem for problem in problems if problem])

    def _problem(self, index: int) -> str | None:
        path, (codes, labels) = self.paths[index], self._maps[index]
        if file_hash(path) != self.meta.checksums[index]:
            return f"{path} is damaged: its checksum is not the one in {META_NAME}"
        if codes.size and codes.max() >= self.meta.codebook_size:
            return f"{path} has code {codes.max()}, but codebooks have {self.meta.codebook_size} entries"
        if labels.size and not (0 <= labels.min() and labels.max() < len(self.meta.class_names)):
            return f"{path} has labels outside [0, {len(self.meta.class_names)})"
        return None


def _raise_any(problems: list[str]) -> None:
    if problems:
        shown = "; ".join(problems[:MOST_NAMED]) + (
            f"; and {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
        )
        raise ValueError(f"{shown}: run extract_codes.py on the folder again, it makes these shards and no others")


def read_meta(folder: Path) -> CodeMeta:
    """Read and check meta.json; ValueError says what is wrong with it."""
    path = folder / META_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        meta = CodeMeta(**values)
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {META_NAME}: no code shards, or extract_codes.py did not finish") from None
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} is not the description of code shards: {error}") from None
    if meta.format != FORMAT:
        raise ValueError(f"{path} has format {meta.format!r}, this code reads {FORMAT!r}")
    if len(meta.checksums) != len(meta.shard_sizes) or not meta.shard_sizes or not meta.views:
        raise ValueError(f"{path} must list a size and a checksum for each of at least one shard, and the views")
    return meta


def _map_shard(path: Path, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(codes, labels) of a shard, memory-mapped; ValueError unless they have exactly these shapes."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    wanted = {"codes": ("U16", np.uint16, shape), "labels": ("I64", np.int64, shape[:1])}
    try:
        header, header_bytes = _read_header(path)
        maps = {}
        for name, (code, dtype, expected) in wanted.items():
            entry = header[name]
            if entry["dtype"] != code or tuple(entry["shape"]) != expected:
                raise ValueError(f"{name} is {entry['dtype']} {entry['shape']}, expected {code} {list(expected)}")
            begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
            if end > path.stat().st_size or end - begin != np.dtype(dtype).itemsize * int(np.prod(expected)):
                raise ValueError("it is shorter than its header says")
            maps[name] = np.memmap(path, dtype=dtype, mode="r", offset=begin, shape=expected)
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no sound shard ({error})") from None
    return maps["codes"], maps["labels"]


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """A shard's header and its length in bytes. ValueError if it is cut short."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("its header is cut short")
        return json.loads(file.read(length)), length


def left_out(path: Path) -> list[int]:
    """The pictures that a shard lacks, as `write_shard` was given them; none for a file that is no sound shard."""
    try:
        header, _ = _read_header(path)
        return [int(number) for number in json.loads(header.get("__metadata__", {}).get(LEFT_OUT, "[]"))]
    except (OSError, ValueError, TypeError, AttributeError):
        return []


def is_sound_shard(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether there is a shard of full length with codes of this shape (N, A, L, K); its bytes are not looked at."""
    try:
        _map_shard(path, shape)
    except ValueError:
        return False
    return True


class TrainingCodes(Dataset):
    """(index, draw) → (label (), codes (L, K) int64): one of the views, chosen by the seed and the draw."""

    def __init__(self, shards: CodeShards, seed: int):
        self.shards, self.seed = shards, seed

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor]:
        index, draw = item
        views = len(self.shards.meta.views)
        view = int(np.random.default_rng([self.seed, 1, draw]).integers(views)) if views > 1 else 0
        label, codes = self.shards[index, view]
        return torch.tensor(label), torch.from_numpy(codes)


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (index, draw) from a step on: epoch e is a permutation seeded by (seed, e), cut into global batches.

    `draw` numbers the use of an example in the whole run and seeds its augmentation. Each process takes its own part
    of each global batch, so what a step sees does not depend on the number of processes. Examples at the end of an
    epoch that fill no batch go over into the next.
    """

    def __init__(self, length: int, global_batch: int, first_step: int, steps: int, seed: int, world: World):
        self.length, self.global_batch, self.seed, self.world = length, global_batch, seed, world
        self.first_step, self.steps = first_step, steps
        self.share = world.share(global_batch)
        self._epoch = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first_step, self.steps):
            first = step * self.global_batch + self.world.rank * self.share
            yield [(self.index_at(draw), draw) for draw in range(first, first + self.share)]

    def index_at(self, draw: int) -> int:
        """The index of the example that is number `draw` of the whole run."""
        epoch, position = divmod(draw, self.length)
        if self._epoch[0] != epoch:
            del self._epoch  # before the next order is drawn: one of them in memory is enough
            self._epoch = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.length))
        return int(self._epoch[1][position])


def step_batches(
    dataset: Dataset, *, global_batch: int, first_step: int, steps: int, seed: int, workers: int, world: World
) -> Iterator[tuple[Tensor, ...]]:
    """This process's batches of a dataset of (index, draw), one for each step from `first_step` on.

    Close it to end its workers: they do not heed signals. What a worker raises (ValueError, OSError) comes out as it
    was raised, in one line.
    """
    workers = usable_workers(workers)
    loader = DataLoader(
        dataset,
        batch_sampler=StepSampler(len(dataset), global_batch, first_step, steps, seed, world),
        num_workers=workers,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=_start_worker if workers else None,
        prefetch_factor=4 if workers else None,
    )
    batches = iter(loader)
    try:
        yield from batches
    except (ValueError, OSError) as error:
        raise type(error)(_raised_in_worker(str(error))) from None
    finally:
        # It ends its workers when it is freed, but an error on its way out holds on to it.
        getattr(batches, "_shutdown_workers", lambda: None)()


def _raised_in_worker(text: str) -> str:
    """The message of an error that a worker raised, out of the text with its traceback that the loader makes of it."""
    if not text.startswith("Caught "):
        return text
    return text.strip().splitlines()[-1].partition(": ")[2] or text


def usable_workers(wanted: int) -> int:
    """`wanted` data-loading processes, but no more than this process has cores."""
    return min(wanted, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _start_worker(_index: int) -> None:
    # Ctrl-C reaches the whole process group; the training process ends its workers after its last checkpoint.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
