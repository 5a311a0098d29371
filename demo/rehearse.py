"""The whole way at a tiny size: picture folder → tar shards → codes → generator → bundle → pictures.

    python demo/rehearse.py --images demo/data/train --work demo/work/rehearsal

Every step is a command as it would be run at full size, extraction and training with two processes, so that what would
fail there fails here within minutes. Run it on a new machine before a long run. Each step goes on where it stopped.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from llamagen_unitok.gpt import GPT
from llamagen_unitok.labels import LABELS_NAME, ClassNames
from llamagen_unitok.pipeline import ImageGenerator
from llamagen_unitok.runtime.files import replacing
from llamagen_unitok.runtime.flags import Parser, add_flags, run_cli, settings_from
from llamagen_unitok.training.sources import open_image_folder
from tokenizer import load_tokenizer, tokenizer_folder


@dataclass(frozen=True)
class Rehearsal:
    """Settings; what is not here is as the scripts have it."""

    images: Path = field(metadata={"help": "folder with one subfolder of pictures for each class"})
    work: Path = field(metadata={"help": "where tar shards, codes, the run and the bundle go"})
    tokenizer: Path = field(default=ROOT / "checkpoints" / "emoji", metadata={"help": "a tokenizer, or a bundle"})
    classes: int = field(default=8, metadata={"help": "subfolders taken, the first ones"})
    per_tar: int = field(default=10, metadata={"help": "pictures in a tar file"})
    steps: int = field(default=40, metadata={"help": "of training"})
    processes: int = field(default=2, metadata={"help": "that extract and train"})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda; cuda needs as many GPUs as processes"})


def main(argv: list[str] | None = None) -> int:
    parser = Parser("Rehearse data, extraction, training and sampling at a tiny size.")
    add_flags(parser, Rehearsal)
    flags = parser.parse_args(argv)
    return run_cli(lambda: rehearse(settings_from(Rehearsal, flags)))


def rehearse(settings: Rehearsal) -> None:
    """Run all steps; ValueError names the first that fails."""
    tars, codes, run, bundle = (settings.work / name for name in ("tars", "codes", "run", "bundle"))
    names = pack_tars(settings.images, tars, classes=settings.classes, per_tar=settings.per_tar)
    common = ["--device", settings.device]
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", settings.processes]

    extraction = [
        "--images",
        tars,
        "--class-names",
        tars / LABELS_NAME,
        "--tokenizer",
        settings.tokenizer,
        "--out",
        codes,
    ]
    extraction += ["--views", "flip", "--shard-size", settings.per_tar, "--batch-size", 4, "--verify", 8]
    command([*many, ROOT / "extract_codes.py", *extraction, *common])

    training = ["--codes", codes, "--out", run, "--preview", settings.tokenizer, "--class-names", tars / LABELS_NAME]
    training += ["--layers", 2, "--heads", 2, "--width", 64, "--depth-layers", 1, "--ffn-multiple", 32]
    training += ["--steps", settings.steps, "--warmup-steps", settings.steps // 10, "--batch-size", 8, "--lr", 2e-3]
    training += ["--log-every", max(1, settings.steps // 8), "--save-every", settings.steps, "--workers", 1]
    command([ROOT / "train_gpt.py", *training, *common, "--check"])
    command([*many, ROOT / "train_gpt.py", *training, *common])

    tokenizer = load_tokenizer(tokenizer_folder(settings.tokenizer))
    ImageGenerator(GPT.from_pretrained(run / "generator"), tokenizer, names).save_pretrained(bundle)
    samples = ["--checkpoint", bundle, "--class", "0,1", "--num", 2, "--out", settings.work / "samples.png"]
    command([ROOT / "sample.py", *samples, *common])
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    print(f"{settings.work}: the loss went from {losses[0]:.3f} to {losses[-1]:.3f}; look at samples.png")


def pack_tars(images: Path, out: Path, *, classes: int, per_tar: int) -> ClassNames:
    """The first classes of an image folder as tar shards in webdataset layout, ``key.ending`` beside ``key.cls``.

    Returns the names of the classes, the subfolders', which labels.json beside the shards holds too.
    """
    folder = open_image_folder(images)
    samples = [(Path(path), label) for path, label in folder.samples if label < classes]
    out.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(samples), per_tar):
        path = out / f"train-{first // per_tar:05d}.tar"
        if path.exists():
            continue
        with replacing(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
            for number, (picture, label) in enumerate(samples[first : first + per_tar], first):
                for ending, data in ((picture.suffix, picture.read_bytes()), (".cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{number:08d}{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    names = ClassNames(folder.classes[:classes])
    names.save(out)
    return names


def command(arguments: list[object]) -> None:
    """Run a Python command; ValueError when it fails."""
    words = [str(argument) for argument in arguments]
    print(f"$ python {shlex.join(words)}", file=sys.stderr)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    code = subprocess.run([sys.executable, *words], env=environment).returncode
    if code:
        script = next(Path(word).name for word in words if word.endswith(".py"))
        raise ValueError(f"the rehearsal ends at {script}, exit code {code}: its message is above")


if __name__ == "__main__":
    sys.exit(main())
