#!/usr/bin/env python
"""Pictures → code shards, for train_gpt.py. One process, or many with torchrun; goes on where it was interrupted.

python extract_codes.py --images DIR --tokenizer DIR_OR_HUB_ID --out DIR [--ten-crop]
torchrun --nproc-per-node 8 extract_codes.py --images 'train-{0000..0145}.tar' --class-names imagenet …
"""

import sys
from argparse import SUPPRESS
from pathlib import Path

from llamagen_unitok.published.cache import locate_model
from llamagen_unitok.published.convert import read_names
from llamagen_unitok.runtime.distributed import processes
from llamagen_unitok.runtime.flags import Parser, add_flags, run_cli, settings_from
from llamagen_unitok.training.extraction import VERIFY_NAME, Extraction, extract_codes, verify_codes
from tokenizer import load_tokenizer, tokenizer_folder


def main(argv: list[str] | None = None) -> int:
    parser = Parser("Write the codes of all pictures as shards: uint16 (pictures, views, positions, codebooks).")
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR_OR_HUB_ID", help="tokenizer folder, bundle, or unitok-large"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the shards go")
    parser.add_argument(
        "--ten-crop",
        dest="views",
        action="store_const",
        const="ten-crop",
        default=SUPPRESS,
        help="same as --views ten-crop",
    )
    parser.add_argument(
        "--class-names", metavar="FILE", help="what labels mean: a labels.json, imagenet, or how many classes there are"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    add_flags(parser, Extraction)
    flags = parser.parse_args(argv)

    def body() -> None:
        settings = settings_from(Extraction, flags)
        folder = tokenizer_folder(locate_model(flags.tokenizer))
        names = read_names(flags.class_names, "--class-names") if flags.class_names else None
        tokenizer = load_tokenizer(folder)
        with processes(flags.device) as world:
            shards = extract_codes(
                tokenizer, folder, settings, out=flags.out, world=world, names=names, tokenizer_name=flags.tokenizer
            )
            if world.is_main:
                print(f"{flags.out}: {len(shards)} pictures with {len(shards.meta.views)} views each")
                if settings.verify:
                    ratio = verify_codes(tokenizer, shards, settings, flags.out)
                    print(f"{flags.out / VERIFY_NAME}: originals and their codes decoded, PSNR {ratio:.1f} dB")

    return run_cli(body)


if __name__ == "__main__":
    sys.exit(main())
