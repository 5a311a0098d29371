#!/usr/bin/env python
"""Samples and a reference → FID, sFID, Inception Score, precision, recall, KID. One process, or many with torchrun.

python evaluate.py samples.npz --reference VIRTUAL_imagenet256_labeled.npz --json figures.json
python evaluate.py pictures/ --reference real.npz --features efficientnet-lite0
python evaluate.py --make-reference pictures/ --out real.npz
python evaluate.py --reconstruct pictures/ --tokenizer checkpoints/emoji --features efficientnet-lite0
python evaluate.py --diagnose checkpoints/emoji --codes runs/codes --pictures diagnosis
"""

import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np

from llamagen_unitok.evaluation.diagnostics import DiagnosisSettings, diagnose
from llamagen_unitok.evaluation.extractors import EXTRACTORS, Extractor, make_extractor, pooled_features
from llamagen_unitok.evaluation.figures import (
    BiasedFigureWarning,
    EvaluationSettings,
    evaluate_samples,
    evaluation_record,
    origin,
    shared_extractor,
)
from llamagen_unitok.evaluation.images import open_images
from llamagen_unitok.evaluation.provenance import model_record
from llamagen_unitok.evaluation.reconstruction import ReconstructionDistance, ReconstructionSettings, reconstruct
from llamagen_unitok.evaluation.references import ADM_PICTURES, Reference, make_reference
from llamagen_unitok.pipeline import DTYPES, ImageGenerator
from llamagen_unitok.published.cache import locate_model
from llamagen_unitok.runtime.distributed import pick_device, processes
from llamagen_unitok.runtime.errors import ToldByMain
from llamagen_unitok.runtime.files import check_writable_file, replacing
from llamagen_unitok.runtime.flags import Parser, add_flags, given_flags, run_cli, settings_from
from llamagen_unitok.sampling import SamplingConfig
from modelfolder import content_hash
from tokenizer import load_tokenizer
from tokenizer.table import tokenizer_folder


def main(argv: list[str] | None = None) -> int:
    words = {word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    # Each of these measures something else than samples, with flags of its own.
    if "--reconstruct" in words:
        flags = build_reconstruction_parser().parse_args(argv)
        return run_cli(lambda: measure_tokenizer(flags))
    if "--diagnose" in words:
        flags = build_diagnosis_parser().parse_args(argv)
        return run_cli(lambda: measure_generator(flags))
    parser = build_parser()
    flags = parser.parse_args(argv)

    def body() -> None:
        given = given_flags(parser, argv)
        if flags.make_reference:
            refuse_flags("--make-reference", given & {"reference", "json", "metrics"}, "is for measuring samples")
            if flags.samples:
                raise ValueError(f"--make-reference takes its pictures itself: leave out {flags.samples}")
            make(flags)
        else:
            refuse_flags("without --make-reference", given & {"out", "pictures"}, "is for making a reference")
            evaluate(flags)

    return run_cli(body)


def refuse_flags(here: str, given: set[str], reason: str) -> None:
    """ValueError, in one line, for flags that would have no effect."""
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(given))
        raise ValueError(f"{here}: {names} {reason}, leave it out")


def build_parser() -> Parser:
    parser = Parser(
        "Measure samples against real pictures, by the protocol of ADM's tables.",
        usage="evaluate.py SAMPLES --reference REF [--features NAME] [--json FILE] [more flags below]",
        epilog="SAMPLES and REF are an .npz with a uint8 array (N, height, width, 3), or a folder of pictures.\n"
        "A tokenizer's figures: evaluate.py --reconstruct X --help. A generator's: evaluate.py --diagnose X --help.",
    )
    parser.add_argument("samples", nargs="?", type=Path, metavar="SAMPLES", help="an .npz of pictures, or a folder")
    parser.add_argument("--reference", type=Path, metavar="REF", help="ADM's .npz, any .npz of pictures, or a folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and where they come from")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    add_flags(parser.add_argument_group("how to measure"), EvaluationSettings)
    making = parser.add_argument_group("make a reference")
    making.add_argument("--make-reference", type=Path, metavar="PICTURES", help="write one in ADM's layout to --out")
    making.add_argument("--out", type=Path, metavar="FILE", help="the reference to write, an .npz")
    making.add_argument(
        "--pictures",
        type=int,
        default=ADM_PICTURES,
        metavar="N",
        help=f"how many to keep in it, for precision, recall and KID (default {ADM_PICTURES})",
    )
    return parser


def evaluate(flags) -> None:
    """Check everything, then measure, print one figure a line, and write the record."""
    settings = settings_from(EvaluationSettings, flags)
    if flags.samples is None or flags.reference is None:
        raise ValueError("SAMPLES and --reference are needed, as in evaluate.py samples.npz --reference real.npz")
    if flags.json:
        check_writable_file("--json", flags.json, (".json",))
    # before the network is read
    open_images(flags.samples)
    reference = Reference(flags.reference)
    with processes(flags.device) as world, warnings.catch_warnings():
        warnings.simplefilter("ignore", BiasedFigureWarning)  # printed below
        extractor = shared_extractor(settings, world)
        result = evaluate_samples(
            flags.samples,
            reference,
            extractor,
            metrics=settings.metric_names(),
            batch_size=settings.batch_size,
            world=world,
        )
        if not world.is_main:
            return
        record = evaluation_record(result, flags.samples, flags.reference, extractor)
    tell(record["warnings"])
    width = max(map(len, record["figures"]))
    for name, value in record["figures"].items():
        print(f"{name:{width}}  {value:.6g}")
    print(f"{result['num_samples']} samples against {flags.reference}, features of {extractor.name}")
    write_json(flags.json, record)


def make(flags) -> None:
    """Write a reference."""
    settings = settings_from(EvaluationSettings, flags)
    if flags.out is None:
        raise ValueError("--make-reference needs --out FILE.npz")
    if flags.pictures < 1:
        raise ValueError(f"--pictures must be a whole number of at least 1, got {flags.pictures}")
    check_writable_file("--out", flags.out, (".npz",))
    open_images(flags.make_reference)
    with processes(flags.device) as world:
        extractor = shared_extractor(settings, world)
        make_reference(
            flags.make_reference,
            flags.out,
            extractor,
            batch_size=settings.batch_size,
            most=flags.pictures,
            world=world,
        )
        if world.is_main:
            print(flags.out)


def build_reconstruction_parser() -> Parser:
    parser = Parser(
        "Measure how well a tokenizer's pictures come back: PSNR, SSIM, LPIPS, rFID, and how its codebooks are used.",
        usage="evaluate.py --reconstruct PICTURES --tokenizer T [--features NAME] [--sheet PNG] [more flags below]",
    )
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR_OR_ID", help="a bundle or tokenizer; or unitok-large"
    )
    add_flags(parser, ReconstructionSettings, rename={"images": "reconstruct"})
    parser.add_argument("--features", choices=EXTRACTORS, metavar="NAME", help="network of rFID (default: no rFID)")
    parser.add_argument("--inception-weights", type=Path, metavar="FILE", help="see evaluate.py --help")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and where they come from")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser


def check_alone(flag: str) -> None:
    """ValueError, told by the first process, where torchrun has started several: each would do all of the work."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        error = ValueError if os.environ.get("RANK", "0") == "0" else ToldByMain
        raise error(f"{flag} runs in one process: start it with python, not with torchrun")


def network_from(flags, device) -> Extractor | None:
    """The network of --features, if it is given; ValueError for weights that nothing would read."""
    if flags.inception_weights and flags.features != "inception":
        raise ValueError("--inception-weights goes with --features inception")
    return make_extractor(flags.features, flags.inception_weights, device) if flags.features else None


def measure_tokenizer(flags) -> None:
    """Pictures there and back; with --features also the Fréchet distance between both sets."""
    check_alone("--reconstruct")
    settings = settings_from(ReconstructionSettings, flags)
    if flags.json:
        check_writable_file("--json", flags.json, (".json",))
    device = pick_device(flags.device)
    folder = locate_model(flags.tokenizer)
    extractor = network_from(flags, device)
    tokenizer = load_tokenizer(folder).to(device)
    distance = ReconstructionDistance(extractor) if extractor else None
    figures = reconstruct(tokenizer, settings, observers=[distance] if distance else [])
    if distance:
        figures |= distance.figures()
    warned = distance.warnings() if distance else []
    record = {
        "figures": figures,
        "tokenizer": {"name": str(flags.tokenizer), "hash": content_hash(tokenizer_folder(folder))},
        "warnings": warned,
        **origin(extractor),
    }
    tell(warned)
    for name in ("psnr_db", "ssim", "lpips"):
        values = figures[name]
        shown = f"mean {values['mean']:.4g}, worst {values['worst']:.4g}" if values else figures["lpips_left_out"]
        print(f"{name}  {shown}")
    if distance:
        print(f"{distance.name}  {figures[distance.name]:.4g}")
    books = figures["codebooks"]
    print(f"codebook usage  {' '.join(f'{share:.1%}' for share in books['usage'])}")
    print(f"perplexity of {books['entries']}  {' '.join(f'{value:.0f}' for value in books['perplexity'])}")
    print(f"{figures['pictures']} pictures")
    write_json(flags.json, record)


def build_diagnosis_parser() -> Parser:
    parser = Parser(
        "Look into a generator: bits per code by position and codebook, code usage, memorised pictures, retrieval.",
        usage="evaluate.py --diagnose BUNDLE --codes DIR [--pictures DIR] [--features NAME] [more flags below]",
    )
    parser.add_argument("--diagnose", required=True, metavar="BUNDLE", help="a bundle, or a published name")
    add_flags(parser, DiagnosisSettings)
    add_flags(parser.add_argument_group("how samples are drawn"), SamplingConfig)
    parser.add_argument("--features", choices=EXTRACTORS, metavar="NAME", help="network of the class retrieval")
    parser.add_argument("--inception-weights", type=Path, metavar="FILE", help="see evaluate.py --help")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and where they come from")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="auto is fp32 on cpu, bf16 on cuda")
    return parser


def measure_generator(flags) -> None:
    """A generator against its training codes."""
    check_alone("--diagnose")
    settings, sampling = settings_from(DiagnosisSettings, flags), settings_from(SamplingConfig, flags)
    if flags.json:
        check_writable_file("--json", flags.json, (".json",))
    device = pick_device(flags.device)
    folder = locate_model(flags.diagnose)
    extractor = network_from(flags, device)
    hashes = model_record(folder)
    generator = ImageGenerator.from_pretrained(folder, device=device, dtype=flags.dtype)
    generator.tokenizer.to(device)
    figures = diagnose(
        generator,
        settings,
        sampling=sampling,
        extract=pooled_features(extractor) if extractor else None,
        tokenizer_hash=hashes["tokenizer_hash"],
    )
    for name in ("conditional", "unconditional"):
        if values := figures["likelihood"][name]:
            print(f"bits per code, {name}  {values['bits_per_code']:.4g}")
    usage = figures["usage"]["jensen_shannon_bits"]
    print(f"codes of samples against data, Jensen-Shannon  {np.mean(usage):.4g} bits")
    memory = figures["memorisation"]
    print(f"samples equal to a training entry  {memory['share_exact']:.1%} of {memory['samples']}")
    if extractor:
        print(f"class retrieval  {figures['retrieval']['accuracy']:.1%} (chance {figures['retrieval']['chance']:.2%})")
    write_json(flags.json, {"figures": figures, "checkpoint": {"name": flags.diagnose, **hashes}, **origin(extractor)})


def tell(warned: list[str]) -> None:
    """Print warnings, one a line."""
    for text in warned:
        print(f"warning: {text}", file=sys.stderr)


def write_json(path: Path | None, record: dict) -> None:
    """Write a record where --json says, if it does."""
    if path:
        with replacing(path) as file:
            file.write((json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
        print(path)


if __name__ == "__main__":
    sys.exit(main())
