#!/usr/bin/env python
"""Sampling settings × checkpoints → a table of figures, plots and a report. One process, or many with torchrun.

python sweep.py --checkpoint runs/b/bundle --cfg 1.0,1.5,2.0 --temperature 0.9,1.0 --reference real.npz --out sweeps/b
torchrun --nproc-per-node 8 sweep.py … --budget 5000 --refine 6
"""

import sys
import warnings
from pathlib import Path

from llamagen_unitok.evaluation.figures import BiasedFigureWarning, EvaluationSettings, shared_extractor
from llamagen_unitok.evaluation.references import Reference
from llamagen_unitok.evaluation.report import write_report
from llamagen_unitok.evaluation.samples import LABEL_SCHEMES, SampleRun
from llamagen_unitok.evaluation.sweep import Sweep, grid
from llamagen_unitok.pipeline import DECODERS, DTYPES
from llamagen_unitok.runtime.distributed import processes
from llamagen_unitok.runtime.files import check_writable_folder
from llamagen_unitok.runtime.flags import Parser, add_flags, list_of, run_cli, settings_from
from llamagen_unitok.sampling import ENGINES, SamplingConfig
from llamagen_unitok.sampling.batches import number_or_auto
from tokenizer.images import Resize

QUICK_STEPS = 4  # of a search for the best guidance: they shrink the interval that holds it to a quarter
SHIPPED = Path(__file__).resolve().parent / "checkpoints" / "emoji"


def main(argv: list[str] | None = None) -> int:
    flags = build_parser().parse_args(argv)
    return run_cli(lambda: sweep(flags))


def build_parser() -> Parser:
    parser = Parser(
        "Measure a grid of sampling settings; started again with the same --out, it goes on where it stopped.",
        usage="sweep.py --reference REF --out DIR [--cfg 1,1.5,2] [--temperature 0.9,1] [more flags below]",
        epilog="LISTs have commas between values. Each setting adds a row to results.csv; report.md is last.",
    )
    what = parser.add_argument_group("what to sample (every combination)")
    what.add_argument("--checkpoint", default=str(SHIPPED), metavar="LIST", help="bundles or names (default: emoji)")
    for name, kind in VALUES.items():
        field = SamplingConfig.__dataclass_fields__[name]
        what.add_argument(
            field.metadata["flag"], dest=name, type=list_of(kind), default=[field.default], metavar="LIST",
            help=HELP.get(name) or f"{field.metadata['help'].replace('%', '%%')} (default {field.default})",
        )  # fmt: skip
    what.add_argument("--seed", type=int, default=0, metavar="N", help="of every setting (default 0)")
    much = parser.add_argument_group("how much")
    much.add_argument("--num-samples", type=int, default=50_000, metavar="N", help="a setting (default 50000)")
    much.add_argument(
        "--budget", type=int, metavar="N", help="a quick look: N samples a setting, then --num-samples of the best"
    )
    much.add_argument(
        "--refine",
        type=int,
        metavar="N",
        help=f"golden-section steps for the best guidance, after the grid (default 0; {QUICK_STEPS} with --budget)",
    )
    much.add_argument("--labels", default=SampleRun.labels, choices=LABEL_SCHEMES, help="as many of each, or drawn")
    much.add_argument(
        "--batch-size",
        dest="sampled_at_once",  # batch_size is that of the features
        type=number_or_auto,
        default=SampleRun.batch_size,
        metavar="N",
        help=f"pictures sampled at once (default {SampleRun.batch_size}), or auto: what memory holds",
    )
    much.add_argument("--tokenizer", metavar="DIR_OR_HUB_ID", help="a tokenizer, if not the bundles' own")
    much.add_argument("--resize", metavar="N[:bicubic]", help="side in pixels, by area, or as LlamaGen: bicubic")
    much.add_argument("--device", default="auto", help="auto, cpu or cuda")
    much.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="auto is fp32 on cpu, bf16 on cuda")
    much.add_argument(
        "--engine", default="auto", choices=["auto", *ENGINES], help="auto: native (cpu), compiled (cuda)"
    )
    much.add_argument("--decoder", default="plain", choices=DECODERS, help="plain is exact; see sample.py")
    measure = parser.add_argument_group("how to measure")
    measure.add_argument("--reference", type=Path, required=True, metavar="REF", help="see evaluate.py")
    add_flags(measure, EvaluationSettings, rename={"batch_size": "features-batch-size"})
    output = parser.add_argument_group("what to write")
    output.add_argument("--out", type=Path, required=True, metavar="DIR", help="table, plots and report")
    output.add_argument("--keep-samples", action="store_true", help="leave the .npz of each setting in DIR/samples")
    return parser


def whole_or_none(text: str) -> int | None:
    """A whole number, or None for "none"."""
    return None if text == "none" else int(text)


# What a grid can vary, and the type of one value.
VALUES = {
    "cfg_scale": float,
    "cfg_schedule": str,
    "cfg_power": float,
    "cfg_interval": whole_or_none,
    "temperature": float,
    "top_k": int,
    "top_p": float,
}
HELP = {"cfg_interval": "N: guide positions 0 to N+1 only; none: all (default none)"}


def sweep(flags) -> None:
    """Check everything, then measure the grid, refine, confirm, report."""
    checkpoints = [name.strip() for name in flags.checkpoint.split(",")]
    settings = grid(checkpoints, {name: getattr(flags, name) for name in VALUES}, flags.seed)
    resize = Resize.parse(flags.resize) if flags.resize is not None else None
    measuring = settings_from(EvaluationSettings, flags)
    quick = flags.num_samples if flags.budget is None else flags.budget
    at_once = flags.sampled_at_once
    for count in (quick, flags.num_samples):
        SampleRun(count, flags.labels, SampleRun.batch_size if at_once == "auto" else at_once)
    refine = flags.refine if flags.refine is not None else 0 if flags.budget is None else QUICK_STEPS
    if refine < 0:
        raise ValueError(f"--refine must be a whole number of at least 0, got {refine}")
    flags.out.mkdir(parents=True, exist_ok=True)
    check_writable_folder("--out", flags.out)
    with processes(flags.device) as world, warnings.catch_warnings():
        warnings.simplefilter("ignore", BiasedFigureWarning)  # each row says it
        reference = world.together(lambda: Reference(flags.reference))
        extractor = shared_extractor(measuring, world)
        run = Sweep(
            flags.out,
            reference,
            extractor,
            world,
            labels=flags.labels,
            batch_size=at_once,
            tokenizer=flags.tokenizer,
            dtype=flags.dtype,
            engine=flags.engine,
            decoder=flags.decoder,
            resize=resize,
            metrics=measuring.metric_names(),
            features_batch_size=measuring.batch_size,
            keep_samples=flags.keep_samples,
        )
        run.check(settings, (quick, flags.num_samples))
        for number, setting in enumerate(settings, start=1):
            row = run.measure(setting, quick)
            if world.is_main:
                print(f"{number}/{len(settings)}  {describe(setting)}  {extractor.frechet_name} {run.frechet(row):.4g}")
        run.refine(settings, refine, quick)
        if quick != flags.num_samples:
            run.confirm(flags.num_samples)
        if world.is_main:
            print(flags.out / "results.csv")
            print(write_report(run.rows(), extractor, flags.out))
            print(f"{run.measured} settings measured now, {len(run.table.rows)} in the table")


def describe(setting) -> str:
    """What of a setting is not the default."""
    default = SamplingConfig()
    parts = [
        f"{SamplingConfig.__dataclass_fields__[name].metadata['flag']} {getattr(setting.sampling, name)}"
        for name in VALUES
        if name == "cfg_scale" or getattr(setting.sampling, name) != getattr(default, name)
    ]
    return f"{Path(setting.checkpoint).name} {' '.join(parts)}"


if __name__ == "__main__":
    sys.exit(main())
