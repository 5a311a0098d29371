"""Large seeded runs: many pictures in one .npz, by any number of processes, resumable and always the same.

Sample i of a run has the label that its scheme gives to i and the noise of (seed, i). The run is cut into batches of
one shape and the batches into parts; a part is a file beside the .npz (``NAME.npz.parts/``) until all are there. Which
process makes which part changes nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llamagen_unitok.evaluation.npz import ArrayStream, NpzReader, write_npz
from llamagen_unitok.evaluation.provenance import RECORD_NAME, as_array, code_version, command_line, read_record
from llamagen_unitok.pipeline import ImageGenerator
from llamagen_unitok.runtime.background import Background
from llamagen_unitok.runtime.distributed import World
from llamagen_unitok.runtime.files import clear_unfinished, replacing
from llamagen_unitok.runtime.memory import explained_batch
from llamagen_unitok.sampling import SamplingConfig, engine_name, generate
from llamagen_unitok.sampling.seeds import MAX_SEED
from tokenizer.images import Resize, to_uint8

PART_PICTURES = 256  # a part has at least so many, so that an interruption loses little and files stay few
DECODE_ROWS = 16  # pictures that the tokenizer decodes at once
JOB_NAME = "job.json"
RECORD_FORMAT = "llamagen-unitok samples 1"
ABOUT = ("code_version", "command", "preset")  # what a record tells of a run that decides no pixel


def balanced_labels(count: int, classes: np.ndarray, seed: int) -> np.ndarray:
    """The classes in turn: as many of each as of any other, or one more, in every run and every beginning of one."""
    return classes[np.arange(count) % len(classes)]


def random_labels(count: int, classes: np.ndarray, seed: int) -> np.ndarray:
    """Classes drawn evenly, as the published samplers do; which ones follows from the seed."""
    # No picture has this index, so the draws have no noise in common with one.
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, MAX_SEED], dtype=np.uint64)))
    return classes[generator.integers(len(classes), size=count)]


# (count, classes, seed) → labels (count,) int64; those of a shorter run are the first of a longer one.
LABEL_SCHEMES: dict[str, Callable[[int, np.ndarray, int], np.ndarray]] = {
    "balanced": balanced_labels,
    "random": random_labels,
}


@dataclass(frozen=True)
class SampleRun:
    """What a large run is, beside how it samples. Raises ValueError for impossible values."""

    num_samples: int = field(metadata={"flag": "--num-samples", "help": "pictures of a large run, over all classes"})
    labels: str = field(
        default="balanced",
        metadata={"flag": "--labels", "help": "classes of a large run", "choices": tuple(LABEL_SCHEMES)},
    )
    batch_size: int = field(default=32, metadata={"flag": "--batch-size", "help": "pictures at a time"})

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be a whole number of at least 1, got {value!r}")
        if self.labels not in LABEL_SCHEMES:
            raise ValueError(f"--labels must be one of {', '.join(LABEL_SCHEMES)}, got {self.labels!r}")

    @property
    def part_size(self) -> int:
        """Pictures in a part: whole batches."""
        return self.batch_size * -(-PART_PICTURES // self.batch_size)

    def parts(self) -> list[range]:
        """The sample numbers of each part."""
        size = self.part_size
        return [range(i, min(i + size, self.num_samples)) for i in range(0, self.num_samples, size)]


def sample_record(
    generator: ImageGenerator,
    models: dict[str, str],
    run: SampleRun,
    sampling: SamplingConfig,
    *,
    classes: list[int] | None = None,
    engine: str = "auto",
    preset: str | None = None,
) -> dict[str, Any]:
    """The record of a run of a generator that is loaded; see `run_record`."""
    parameter = generator.gpt.norm.weight
    return run_record(
        models,
        run,
        sampling,
        device=parameter.device,
        dtype=parameter.dtype,
        resize=generator.resize,
        decoder=generator.decoder_name,
        classes=classes,
        engine=engine,
        preset=preset,
    )


def run_record(
    models: dict[str, str],
    run: SampleRun,
    sampling: SamplingConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    resize: Resize | None = None,
    decoder: str = "plain",
    classes: list[int] | None = None,
    engine: str = "auto",
    preset: str | None = None,
) -> dict[str, Any]:
    """Everything that decides the pixels of a run, beside it what is good to know (ABOUT), and nothing that is neither
    (such as the number of processes).

    models: which ones these are, see `provenance.model_record`; it reads all weights, so it is asked once a generator.
    classes: those that labels are taken from; None = all.   engine: "auto" is recorded as what it stands for.
    preset: the name of the row of PRESETS that fixed the settings, if one did.
    """
    return {
        "format": RECORD_FORMAT,
        **models,
        **dataclasses.asdict(sampling),
        **dataclasses.asdict(run),
        **({"resize": dataclasses.asdict(resize)} if resize else {}),
        "classes": "all" if classes is None else classes,
        "engine": engine_name(engine, device.type, large_run=True),
        "decoder": decoder,
        "device": device.type,
        **({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
        "dtype": str(dtype).removeprefix("torch."),
        "code_version": code_version(),
        "command": command_line(),
        **({"preset": preset} if preset else {}),
    }


def deciding(record: dict[str, Any]) -> dict[str, Any]:
    """The part of a record that decides the pixels."""
    return {name: value for name, value in record.items() if name not in ABOUT}


def recorded_batch_size(path: Path) -> int | None:
    """The batch size of the run that `path` holds or that was interrupted there; None where there is none."""
    record = read_record(path) if path.exists() else _job_record(_parts_folder(path))
    return (record or {}).get("batch_size")


def _job_record(folder: Path) -> dict[str, Any] | None:
    """The record of the run whose parts a folder holds; None where there is none. ValueError for a damaged one."""
    job = folder / JOB_NAME
    if not job.exists():
        return None
    try:
        return json.loads(job.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{job} is damaged, so nobody knows whose parts these are: remove {folder}") from None


def _parts_folder(path: Path) -> Path:
    return path.with_name(path.name + ".parts")


def _part_names(folder: Path, run: SampleRun) -> list[Path]:
    count = len(run.parts())
    return [folder / f"part-{i:05d}-of-{count:05d}.npz" for i in range(count)]


def run_samples(
    generator: ImageGenerator, record: dict[str, Any], path: Path, world: World, *, progress: bool = True
) -> int:
    """Write the samples that a record (see `sample_record`) describes to `path`, an .npz that appears when complete.

    It holds arr_0 (uint8, NHWC), label (int64, N), codes (uint16, N × L × K) and record. Parts that an interrupted run
    left are kept, but for damaged ones; a complete file of the same run is left as it is. Memory does not grow with the
    run.
    Returns how many pictures this process made.
    Raises ValueError when `path` or its parts hold another run, and when the disk cannot take it.
    """
    run = SampleRun(**{f.name: record[f.name] for f in dataclasses.fields(SampleRun)})
    parts_folder = _parts_folder(path)
    gpus = sorted({gpu for gpu in world.collect(record.get("gpu")) if gpu})

    def prepare() -> bool:
        """Whether all is there; if not, leave what the run can go on with."""
        if path.exists():
            _refuse_other_run(path, read_record(path), record)
            return True
        if len(gpus) > 1:
            raise ValueError(f"the processes run on {' and '.join(gpus)}: one kind of GPU alone makes equal bytes")
        _open_parts(parts_folder, record)
        clear_unfinished(path.parent, path.name)  # of a process killed while it merged
        _drop_damaged(parts_folder, generator, run)
        _check_disk(parts_folder, generator, run)
        return False

    if world.share_outcome(prepare):
        return 0
    parts = run.parts()
    names = _part_names(parts_folder, run)
    mine = range(world.rank, len(parts), world.size)
    missing = [i for i in mine if not names[i].exists()]
    labels = _labels(generator, run, record)
    made = sum(len(parts[i]) for i in missing)
    generator.tokenizer.to(generator.gpt.norm.weight.device)
    generator.use_decoder(generator.decoder_name)  # one that holds weights of its own follows
    stream = torch.cuda.Stream() if generator.gpt.norm.weight.is_cuda else None
    bar = tqdm(
        total=sum(len(parts[i]) for i in mine),
        initial=sum(len(parts[i]) for i in mine) - made,
        desc=path.name,
        unit="picture",
        disable=not (progress and world.is_main),
        dynamic_ncols=True,
    )
    # On a CPU decoding beside generation would only take its cores; writing takes none.
    with bar, Background() as writer, Background(beside=stream is not None) as decoder:
        for i in missing:
            pixels, codes = [], []
            for batch, numbers in _generate(generator, record, run, labels, parts[i]):
                pixels.append(decoder.submit(_decode, generator, batch, stream, _mark(stream)))
                codes.append(batch)
                bar.update(len(numbers))
            writer.submit(_write_part, names[i], len(parts[i]), pixels, codes)
    world.barrier()
    world.share_outcome(lambda: _merge(names, parts, labels, record, path))
    return made


def _labels(generator: ImageGenerator, run: SampleRun, record: dict[str, Any]) -> np.ndarray:
    classes = range(generator.gpt.config.num_classes) if record["classes"] == "all" else record["classes"]
    return LABEL_SCHEMES[run.labels](run.num_samples, np.asarray(classes, dtype=np.int64), record["seed"])


def _generate(
    generator: ImageGenerator, record: dict[str, Any], run: SampleRun, labels: np.ndarray, part: range
) -> Iterator[tuple[Tensor, range]]:
    """The batches of a part: codes (B, L, K) and the samples that they are; the last batch is padded at its end."""
    sampling = {f.name: record[f.name] for f in dataclasses.fields(SamplingConfig)}
    for first in range(part.start, part.stop, run.batch_size):
        indices = [min(i, part.stop - 1) for i in range(first, first + run.batch_size)]
        with explained_batch(run.batch_size):
            codes = generate(
                generator.gpt, labels[indices].tolist(), indices=indices, engine=record["engine"], **sampling
            )
        yield codes, range(first, min(first + run.batch_size, part.stop))


def _decode(
    generator: ImageGenerator, codes: Tensor, stream: torch.cuda.Stream | None, ready: torch.cuda.Event | None
) -> np.ndarray:
    """codes (B, L, K) → uint8 (B, H, W, 3); on CUDA on a stream of its own, from when the codes are ready."""
    with torch.cuda.stream(stream), explained_batch(len(codes)):
        if ready is not None:
            ready.wait()
        return to_uint8(torch.cat([generator.images(rows) for rows in codes.split(DECODE_ROWS)]))


def _mark(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    """What has been asked of the current stream so far; None without a `stream` that would wait for it."""
    return None if stream is None else torch.cuda.current_stream().record_event()


def _write_part(path: Path, count: int, pixels: list[Future[np.ndarray]], codes: list[Tensor]) -> None:
    """Write the first `count` pictures and codes of the batches of a part, as soon as all are decoded."""
    arrays = {
        "arr_0": np.concatenate([batch.result() for batch in pixels])[:count],
        "codes": torch.cat(codes)[:count].cpu().numpy().astype(np.uint16),
    }
    write_npz(path, arrays)


def _merge(names: list[Path], parts: list[range], labels: np.ndarray, record: dict[str, Any], path: Path) -> None:
    """Make one file of all parts, and remove their folder. ValueError for a damaged one, which is removed."""
    readers = [NpzReader(name) for name in names]

    def stream(array: str) -> ArrayStream:
        def batches() -> Iterator[np.ndarray]:
            for reader, numbers in zip(readers, parts, strict=True):
                try:
                    yield from reader.batches(array, len(numbers))
                except ValueError as error:  # found by its checksum only now
                    reader.path.unlink()
                    raise ValueError(f"{error}; it is removed: the same command makes it again") from None

        first = readers[0]
        return ArrayStream((len(labels), *first.shapes[array][1:]), first.dtypes[array], batches())

    write_npz(
        path, {"arr_0": stream("arr_0"), "label": labels, "codes": stream("codes"), RECORD_NAME: as_array(record)}
    )
    shutil.rmtree(names[0].parent, ignore_errors=True)


def _open_parts(folder: Path, record: dict[str, Any]) -> None:
    """Start the folder of parts, or go on with one of the same run."""
    if found := _job_record(folder):
        _refuse_other_run(folder, found, record)
        clear_unfinished(folder)
        return
    folder.mkdir(exist_ok=True)
    with replacing(folder / JOB_NAME) as file:
        file.write((json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


def _refuse_other_run(where: Path, found: dict[str, Any] | None, record: dict[str, Any]) -> None:
    """ValueError unless `found` decides the same pixels as `record`."""
    found = found or {}
    differing = [
        f"{name} {found.get(name)} there, {record.get(name)} now"
        for name in sorted((found.keys() | record.keys()) - {*ABOUT})
        if found.get(name) != record.get(name)
    ]
    if differing:
        more = ", …" if len(differing) > 3 else ""
        raise ValueError(
            f"{where} holds other samples ({'; '.join(differing[:3])}{more}): remove it, or write to another file"
        )


def _picture_shape(generator: ImageGenerator) -> tuple[int, int, int]:
    side = generator.resize.side if generator.resize else generator.tokenizer.config.img_size
    return side, side, 3


def _drop_damaged(folder: Path, generator: ImageGenerator, run: SampleRun) -> None:
    """Remove parts that a crash of the machine left empty, short, or of other arrays than theirs, to be made again."""
    config = generator.gpt.config
    for name, numbers in zip(_part_names(folder, run), run.parts(), strict=True):
        wanted = {
            "arr_0": (len(numbers), *_picture_shape(generator)),
            "codes": (len(numbers), config.num_positions, config.num_codebooks),
        }
        if name.exists():
            try:
                sound = NpzReader(name).shapes == wanted
            except ValueError:
                sound = False
            if not sound:
                name.unlink()


def _check_disk(folder: Path, generator: ImageGenerator, run: SampleRun) -> None:
    """The parts and the merged file are there side by side for a moment; some of the parts may be there already."""
    config = generator.gpt.config
    picture_bytes = math.prod(_picture_shape(generator)) + 2 * config.num_positions * config.num_codebooks
    there = sum(part.stat().st_size for part in _part_names(folder, run) if part.exists())
    needed, free = max(0, 2 * picture_bytes * run.num_samples - there), shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{folder.parent} has too little room: the run needs {_size_text(needed)} more while it is written, and "
            f"{_size_text(free)} are free"
        )


def _size_text(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
