"""From nothing to checkpoints/emoji: data, tokenizer, codes, generator, bundle. Run it again to go on where it stopped.

    python demo/make_demo.py [--work demo/work] [--out checkpoints/emoji]

The two training runs read demo/tokenizer.json and demo/generator.json; each flag there is one of train_tokenizer.py's
or train_gpt.py's. The bundle is written only when both have finished. Figures: demo/evaluate_demo.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import extract_codes
import train_gpt
import train_tokenizer
from demo.prepare_data import prepare, read_classes
from llamagen_unitok.gpt import GPT
from llamagen_unitok.runtime.flags import run_cli
from tokenizer import UniTok


def flags_from(path: Path) -> list[str]:
    """A JSON object of flags as command-line arguments: true is a bare flag, other values follow their flag."""
    arguments = []
    for name, value in json.loads(path.read_text()).items():
        if value is False:
            continue
        arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return arguments


def run(script, arguments: list[str]) -> None:
    """Call a script's main; stop when it fails."""
    print(f"$ python {script.__name__}.py {' '.join(arguments)}", file=sys.stderr)
    code = script.main(arguments)
    if code:
        raise SystemExit(code)


def half_tokenizer(run_folder: Path) -> Path:
    """The run's tokenizer in half precision: the one that ships, and therefore the one that codes are made with."""
    shipped = run_folder / "shipped" / "tokenizer"
    trained = run_folder / "tokenizer" / "model.safetensors"
    if not shipped.exists() or shipped.stat().st_mtime < trained.stat().st_mtime:
        UniTok.from_pretrained(run_folder / "tokenizer").save_pretrained(shipped, dtype=torch.float16)
    return shipped


def write_labels(folder: Path) -> None:
    """labels.json and aliases.json of the emoji classes."""
    rows = read_classes()
    names = {row["id"]: row["name"] for row in rows}
    aliases: dict[str, int] = {}
    for row in rows:
        for alias in (row["emoji"], *(a for a in row["aliases"].split("|") if a)):
            aliases.setdefault(alias, int(row["id"]))
    for name, values in (("labels.json", names), ("aliases.json", aliases)):
        (folder / name).write_text(json.dumps(values, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def assemble(tokenizer: Path, generator: Path, out: Path) -> None:
    """Write the bundle under a temporary name, then rename; README.md of an earlier bundle is kept."""
    unfinished = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    shutil.copytree(tokenizer, unfinished / "tokenizer")
    GPT.from_pretrained(generator).save_pretrained(unfinished / "generator", dtype=torch.float16)
    write_labels(unfinished)
    shutil.copy(HERE / "model_card.md", unfinished / "README.md")
    shutil.rmtree(out, ignore_errors=True)
    unfinished.rename(out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the shipped emoji model from nothing (hours on two CPU cores).")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="runs, codes and checkpoints")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="pictures (see prepare_data.py)")
    parser.add_argument("--out", type=Path, default=ROOT / "checkpoints" / "emoji", help="the bundle")
    flags = parser.parse_args(argv)

    def body() -> None:
        prepare(flags.data, flags.data / "packages")
        train = str(flags.data / "train")
        tokenizer_run, generator_run = flags.work / "tokenizer", flags.work / "generator"
        codes = str(flags.work / "codes")
        run(
            train_tokenizer,
            ["--images", train, "--out", str(tokenizer_run), *flags_from(HERE / "tokenizer.json")],
        )
        tokenizer = half_tokenizer(tokenizer_run)
        run(extract_codes, ["--images", train, "--tokenizer", str(tokenizer), "--out", codes])
        run(train_gpt, ["--codes", codes, "--out", str(generator_run), *flags_from(HERE / "generator.json")])
        assemble(tokenizer, generator_run / "generator", flags.out)
        print(f"{flags.out}: the bundle is complete; python demo/evaluate_demo.py prints its figures")

    return run_cli(body)


if __name__ == "__main__":
    sys.exit(main())
