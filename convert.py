#!/usr/bin/env python
"""Published checkpoint files → a bundle, for sample.py.

python convert.py GENERATOR.pt TOKENIZER.pth --labels imagenet --out BUNDLE
python convert.py GENERATOR.pt --inspect
"""

import os
import sys
from pathlib import Path

from llamagen_unitok.labels import check_class_order
from llamagen_unitok.published.convert import Conversion, convert, read_names
from llamagen_unitok.published.layouts import describe, open_published
from llamagen_unitok.runtime.files import check_writable_folder
from llamagen_unitok.runtime.flags import Parser, add_flags, run_cli, settings_from
from modelfolder import file_hash


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "Read published LlamaGen, UniTok-LlamaGen, UniTok and VQ-16 files, run nothing in them, and write a bundle.",
        epilog="A tokenizer's file alone gives a tokenizer folder. The result is checked, and complete or not there.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="GENERATOR.pt and TOKENIZER.pth")
    parser.add_argument("--out", type=Path, metavar="BUNDLE", help="the folder to write")
    parser.add_argument("--inspect", action="store_true", help="print what the files hold, and write nothing")
    parser.add_argument(
        "--class-folders", type=Path, metavar="DIR", help="pictures by class: refuse labels in another order than DIR's"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda: where the check draws")
    add_flags(parser, Conversion)
    flags = parser.parse_args(argv)

    def body() -> None:
        settings = settings_from(Conversion, flags)
        if flags.class_folders:
            check_class_order(read_names(settings.labels), _subfolders(flags.class_folders))
        if flags.inspect:
            for path in flags.files:
                print(*describe(open_published(path, settings.weights)), f"  SHA-256 {file_hash(path)}", sep="\n")
            return
        if flags.out is None:
            raise ValueError("--out is missing: give the folder of the bundle, or --inspect to look only")
        if len(flags.files) > 2:
            raise ValueError(f"{len(flags.files)} files are given: one generator and one tokenizer make a bundle")
        check_writable_folder("--out", flags.out)
        print(convert(flags.files, flags.out, settings, device=flags.device, progress=True))

    return run_cli(body)


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(f"--class-folders {folder} is no folder")
    return [entry.name for entry in os.scandir(folder) if entry.is_dir()]


if __name__ == "__main__":
    sys.exit(main())
