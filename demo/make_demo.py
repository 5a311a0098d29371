"""From nothing to checkpoints/emoji: data, tokenizer, codes, generator, bundle. Run it again to go on where it stopped.

    python demo/make_demo.py [--work demo/work] [--out checkpoints/emoji]

The training runs read demo/tokenizer.json, demo/decoder.json (the same tokenizer, its decoder alone) and
demo/generator.json; each flag there is one of train_tokenizer.py's or train_gpt.py's. The generator's temperature is
calibrated last (demo/calibrate.py). The bundle is written when all have finished. Figures: demo/evaluate_demo.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import extract_codes
import train_gpt
import train_tokenizer
from demo.calibrate import calibrate
from demo.prepare_data import prepare, read_classes
from llamagen_unitok.gpt import GPT
from llamagen_unitok.labels import ClassNames
from llamagen_unitok.pipeline import ImageGenerator
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


def packed_tokenizer(run_folder: Path) -> Path:
    """The run's tokenizer in 8-bit storage: the one that ships, and therefore the one that codes are made with."""
    shipped = run_folder / "shipped"
    trained = run_folder / "tokenizer" / "model.safetensors"
    if not shipped.exists() or shipped.stat().st_mtime < trained.stat().st_mtime:
        UniTok.from_pretrained(run_folder / "tokenizer").save_pretrained(shipped, dtype=torch.int8)
    return shipped


def class_names() -> ClassNames:
    """Names of the emoji classes; the characters and other names are aliases, the first class of an alias has it."""
    rows = read_classes()
    aliases: dict[str, int] = {}
    for row in rows:
        for alias in (row["emoji"], *filter(None, row["aliases"].split("|"))):
            aliases.setdefault(alias, int(row["id"]))
    return ClassNames([row["name"] for row in rows], aliases)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the shipped emoji model from nothing (hours on two CPU cores).")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="runs, codes and checkpoints")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="pictures (see prepare_data.py)")
    parser.add_argument("--out", type=Path, default=ROOT / "checkpoints" / "emoji", help="the bundle")
    flags = parser.parse_args(argv)

    def body() -> None:
        prepare(flags.data, flags.data / "packages")
        train = str(flags.data / "train")
        tokenizer_run, decoder_run = flags.work / "tokenizer", flags.work / "decoder"
        generator_run = flags.work / "generator"
        codes = str(flags.work / "codes")
        run(
            train_tokenizer,
            ["--images", train, "--out", str(tokenizer_run), *flags_from(HERE / "tokenizer.json")],
        )
        decoder_flags = [*flags_from(HERE / "decoder.json"), "--init", str(tokenizer_run)]
        run(train_tokenizer, ["--images", train, "--out", str(decoder_run), *decoder_flags])
        tokenizer = packed_tokenizer(decoder_run)
        run(extract_codes, ["--images", train, "--tokenizer", str(tokenizer), "--out", codes])
        run(train_gpt, ["--codes", codes, "--out", str(generator_run), *flags_from(HERE / "generator.json")])
        gpt = GPT.from_pretrained(generator_run / "generator")
        temperature, before, after = calibrate(gpt, flags.work / "codes")
        print(f"logits divided by {temperature:g}: loss {before:.5f} → {after:.5f} nats a code", file=sys.stderr)
        card = (HERE / "model_card.md").read_text(encoding="utf-8")
        bundle = ImageGenerator(gpt, UniTok.from_pretrained(tokenizer), class_names(), card)
        bundle.save_pretrained(flags.out, dtype=torch.int8)
        print(f"{flags.out}: the bundle is complete; python demo/evaluate_demo.py prints its figures")

    return run_cli(body)


if __name__ == "__main__":
    sys.exit(main())
