#!/usr/bin/env python
"""Code shards → a generator. One process, or many with torchrun.

python train_gpt.py --codes DIR --model B --out runs/b
torchrun --nproc-per-node 8 train_gpt.py --codes DIR --recipe unitok-cfgfree --out runs/xxl
python train_gpt.py --recipe unitok-cfgfree --dry-run --gpus 8
python train_gpt.py --codes DIR --out runs/xxl --export bundles/xxl --preview TOKENIZER
"""

import argparse
import sys
from pathlib import Path

from llamagen_unitok.published.cache import locate_model
from llamagen_unitok.published.convert import read_names
from llamagen_unitok.runtime.distributed import processes
from llamagen_unitok.runtime.flags import Parser, add_flags, add_run_flags, given_flags, run_cli, settings_from
from llamagen_unitok.training.data import read_meta
from llamagen_unitok.training.dry_run import IMAGENET, DryRun, dry_run
from llamagen_unitok.training.export import WEIGHTS, export, load_trained
from llamagen_unitok.training.generator import GeneratorTraining, train_generator
from llamagen_unitok.training.loop import LoopConfig
from llamagen_unitok.training.preflight import preflight
from llamagen_unitok.training.recipes import Plan, Resolved, count_steps, describe, differences, resolve
from llamagen_unitok.training.validation import held_out_count

RUN_SETTINGS = (GeneratorTraining, LoopConfig)
USUAL = {
    "out", "resume", "device", "preview", "export", "check", "dry_run", "gpus", "recipe", "epochs", "codes", "model",
    "class_dropout", "held_out", "validate_every", "init", "steps", "batch_size", "lr", "warmup_steps", "ema",
    "precision", "accumulate", "parallel", "checkpoint_activations", "seed", "save_every",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "Train a generator on codes; OUT/generator holds it, OUT/checkpoints what --resume needs.", usual=USUAL
    )
    add_run_flags(parser, out_required=False)
    parser.add_argument("--preview", metavar="TOKENIZER", help="draw pictures with this tokenizer at each checkpoint")
    parser.add_argument(
        "--export", type=Path, metavar="DIR", help="write the generator of the run at OUT there, and end"
    )
    parser.add_argument(
        "--export-weights",
        choices=[*WEIGHTS],
        metavar="|".join(WEIGHTS),
        help="averaged or raw weights (default auto: averaged if there are any)",
    )
    parser.add_argument("--class-names", metavar="FILE", help="what labels must mean: a labels.json, or imagenet")
    parser.add_argument("--check", action="store_true", help="check codes, classes, --preview and disk, and stop")
    parser.add_argument("--dry-run", action="store_true", help="say what the run would cost, and stop")
    for settings in (Plan, *RUN_SETTINGS, DryRun):
        add_flags(parser, settings)
    flags = parser.parse_args(argv)

    def body() -> None:
        resolved = resolve(vars(flags), given_flags(parser, argv), RUN_SETTINGS)
        resolved.take(Plan)
        if flags.preview:
            flags.preview = locate_model(flags.preview, flags.device)
        if flags.out is None and not flags.dry_run:
            raise ValueError("--out is missing: give the folder where the run will live")
        if flags.export_weights and not flags.export:
            raise ValueError(f"--export-weights {flags.export_weights} is for --export: give the folder to write to")
        if flags.export:
            print(export_run(flags))
            return
        training = resolved.take(GeneratorTraining)
        if training.codes is None and not flags.dry_run:
            raise ValueError("--codes is missing: give a folder of code shards, or --dry-run to count without one")
        meta = IMAGENET if training.codes is None else read_meta(training.codes)
        pictures = sum(meta.shard_sizes)
        trained = pictures - held_out_count(pictures, training.held_out)
        resolved = count_steps(resolved, trained, len(meta.views))
        loop = resolved.take(LoopConfig)
        if training.preview_every and not flags.preview:
            raise ValueError("--preview-every needs --preview: give the tokenizer to draw with")
        if flags.dry_run:
            costs = settings_from(DryRun, flags)
            print(describe(resolved))
            print(dry_run(costs, training.architecture_for(meta), training, loop, trained))
            return
        run(flags, resolved, training, loop)

    return run_cli(body)


def run(flags: argparse.Namespace, resolved: Resolved, training: GeneratorTraining, loop: LoopConfig) -> None:
    """Preflight, then training; with --check the whole preflight, and no training."""
    names = read_names(flags.class_names, "--class-names") if flags.class_names else None
    with processes(flags.device) as world:
        report = preflight(
            training, loop, out=flags.out, resume=flags.resume, world=world, tokenizer=flags.preview, names=names,
            recipe=resolved.recipe and f"{resolved.recipe}, {differences(resolved)}", thorough=flags.check,
        )  # fmt: skip
        if world.is_main:
            print(report, file=sys.stdout if flags.check else sys.stderr)
        if flags.check:
            report.check()
            return
        preview = None
        if flags.preview and world.is_main:
            from llamagen_unitok.pipeline import make_preview

            preview = make_preview(flags.preview, device=world.device)
        folder = train_generator(
            training,
            loop,
            out=flags.out,
            resume=flags.resume,
            world=world,
            preview=preview,
            record={"recipe": resolved.recipe, "source": resolved.source, "differs": resolved.differs},
            announce=lambda: print(describe(resolved), file=sys.stderr),
        )
        if world.is_main:
            print(folder)


def export_run(flags: argparse.Namespace) -> Path:
    """A generator folder; with --preview TOKENIZER a whole bundle, whose classes are named as those of the codes."""
    weights = flags.export_weights or "auto"
    if not flags.preview:
        return export(flags.out, flags.export, weights)
    from llamagen_unitok.labels import ClassNames
    from llamagen_unitok.pipeline import ImageGenerator, load_tokenizer

    if flags.codes is None:
        raise ValueError("--export with --preview names the classes as the codes do: give --codes as well")
    gpt = load_trained(flags.out, weights)
    names = ClassNames(read_meta(flags.codes).class_names)
    return ImageGenerator(gpt, load_tokenizer(flags.preview), names).save_pretrained(flags.export)


if __name__ == "__main__":
    sys.exit(main())
