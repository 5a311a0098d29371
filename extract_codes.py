#!/usr/bin/env python
"""Pictures → code shards, for train_gpt.py. One process, or many with torchrun; goes on where it was interrupted.

python extract_codes.py --images DIR --tokenizer DIR_OR_HUB_ID --out DIR [--ten-crop]
"""

import sys
from argparse import SUPPRESS
from pathlib import Path

from llamagen_unitok.runtime.distributed import processes
from llamagen_unitok.runtime.flags import Parser, add_flags, run_cli, settings_from
from llamagen_unitok.training.extraction import Extraction, extract_codes
from modelfolder import locate
from tokenizer import UniTok


def main(argv: list[str] | None = None) -> int:
    parser = Parser("Write the codes of all pictures as shards: uint16 (pictures, views, positions, codebooks).")
    parser.add_argument("--tokenizer", required=True, metavar="DIR_OR_HUB_ID", help="tokenizer folder or bundle")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the shards go")
    parser.add_argument(
        "--ten-crop",
        dest="views",
        action="store_const",
        const="ten-crop",
        default=SUPPRESS,
        help="same as --views ten-crop",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    add_flags(parser, Extraction)
    flags = parser.parse_args(argv)

    def body() -> None:
        settings = settings_from(Extraction, flags)
        folder = UniTok.part_of(locate(flags.tokenizer))
        tokenizer = UniTok.from_pretrained(folder)
        with processes(flags.device) as world:
            shards = extract_codes(
                tokenizer, folder, settings, out=flags.out, world=world, tokenizer_name=str(flags.tokenizer)
            )
            if world.is_main:
                print(f"{flags.out}: {len(shards)} pictures with {len(shards.meta.views)} views each")

    return run_cli(body)


if __name__ == "__main__":
    sys.exit(main())
