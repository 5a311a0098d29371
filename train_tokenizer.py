#!/usr/bin/env python
"""Pictures → a tokenizer. One process, or many with torchrun.

python train_tokenizer.py --images DIR --preset vitamin_tiny --out runs/tokenizer
torchrun --nproc-per-node 8 train_tokenizer.py --images DIR --preset vitamin_large --out runs/tokenizer
"""

import sys
from dataclasses import replace

from llamagen_unitok.runtime.distributed import processes
from llamagen_unitok.runtime.flags import Parser, add_flags, add_run_flags, run_cli, settings_from
from llamagen_unitok.training.loop import LoopConfig
from llamagen_unitok.training.tokenizer import TokenizerTraining, train_tokenizer
from tokenizer import PRESETS

USUAL = {
    "preset", "img_size", "codebooks", "codebook_size", "out", "resume", "device", "images", "init", "freeze_encoder",
    "crop_scale", "flip", "restart_every", "steps", "batch_size", "lr", "warmup_steps", "ema", "precision",
    "accumulate", "seed", "save_every",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "Train a UniTok tokenizer; OUT/tokenizer holds it, OUT/checkpoints what --resume needs.", usual=USUAL
    )
    parser.add_argument("--preset", required=True, choices=sorted(PRESETS), help="size of the tokenizer")
    parser.add_argument("--img-size", type=int, metavar="N", help="pixels along a side, if not the preset's")
    parser.add_argument("--codebooks", type=int, metavar="K", help="codebooks, if not the preset's")
    parser.add_argument("--codebook-size", type=int, metavar="V", help="entries per codebook, if not the preset's")
    add_run_flags(parser)
    add_flags(parser, TokenizerTraining)
    add_flags(parser, LoopConfig)
    flags = parser.parse_args(argv)

    def body() -> None:
        changes = {"img_size": flags.img_size, "num_codebooks": flags.codebooks, "codebook_size": flags.codebook_size}
        config = replace(PRESETS[flags.preset], **{name: value for name, value in changes.items() if value is not None})
        settings, loop = settings_from(TokenizerTraining, flags), settings_from(LoopConfig, flags)
        with processes(flags.device) as world:
            folder = train_tokenizer(config, settings, loop, out=flags.out, resume=flags.resume, world=world)
            if world.is_main:
                print(folder)

    return run_cli(body)


if __name__ == "__main__":
    sys.exit(main())
