"""From nothing to an emoji bundle: data, tokenizer, codes, generator, figures. Run it again to go on where it stopped.

    python demo/make_demo.py [--work demo/work] [--out demo/work/emoji]

The training runs read demo/tokenizer.json, demo/decoder.json (the same tokenizer, its decoder alone) and
demo/generator.json; each flag there is one of train_tokenizer.py's or train_gpt.py's. The generator's temperature is
calibrated last (demo/calibrate.py). The bundle is written when all have finished; then demo/evaluate_demo.py measures
it, and its card gets the figures. Copy it over checkpoints/emoji to ship it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FIGURES = "(figures)"  # where model_card.md wants them
sys.path.insert(0, str(ROOT))

import extract_codes
import train_gpt
import train_tokenizer
from demo import evaluate_demo
from demo.calibrate import calibrate
from demo.prepare_data import prepare, read_classes
from llamagen_unitok.gpt import GPT
from llamagen_unitok.labels import ClassNames
from llamagen_unitok.pipeline import CARD_NAME, ImageGenerator
from llamagen_unitok.runtime.files import replacing
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
    print(f"$ python {script.__name__.replace('.', '/')}.py {' '.join(arguments)}", file=sys.stderr)
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


def card(figures: dict | None) -> str:
    """The model card, with what evaluate_demo.py measured; None says that nothing was."""
    text = (HERE / "model_card.md").read_text(encoding="utf-8")
    if figures is None:
        return text.replace(FIGURES, "Not measured.")
    shares = figures["recognised"]["by_cfg"]
    styles, psnr, batches = figures["styles"], figures["psnr"], figures["batches"]
    rows = [
        *((f"recognised, guidance {scale}", f"{share:.1%}") for scale, share in shares.items()),
        (f"at least 2 of 3 styles over {styles['seeds']} seeds", f"{styles['at_least_2_styles']:.1%}"),
        ("all 3 styles", f"{styles['all_3_styles']:.1%}"),
        *((f"PSNR, {name} pictures", f"{part['mean_db']:.1f} dB") for name, part in psnr.items()),
        (f"equal pictures at batch sizes {batches['batch_sizes']}, fp32", f"{batches['equal']:.1%}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    classes = figures["recognised"]["classes"]
    printed = f"Printed by `python demo/evaluate_demo.py`: {classes} classes, temperature 1, seed 0."
    return text.replace(FIGURES, f"{printed}\n\n| | measured |\n|---|---|\n{table}")


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
    parser.add_argument("--out", type=Path, help="the bundle (default: WORK/emoji)")
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
        out = flags.out or flags.work / "emoji"
        bundle = ImageGenerator(gpt, UniTok.from_pretrained(tokenizer), class_names(), card(None))
        bundle.save_pretrained(out, dtype=torch.int8)
        figures = flags.work / "figures.json"
        run(
            evaluate_demo,
            ["--checkpoint", str(out), "--data", str(flags.data), "--work", str(flags.work), "--json", str(figures)],
        )
        with replacing(out / CARD_NAME) as file:
            file.write(card(json.loads(figures.read_text())).encode())
        print(f"{out}: the bundle is complete")

    return run_cli(body)


if __name__ == "__main__":
    sys.exit(main())
