#!/usr/bin/env python
"""Code shards → a generator. One process, or many with torchrun.

python train_gpt.py --codes DIR --model B --out runs/b
torchrun --nproc-per-node 8 train_gpt.py --codes DIR --model XXL --batch-size 1024 --out runs/xxl
"""

import sys

from llamagen_unitok.runtime.distributed import processes
from llamagen_unitok.runtime.flags import Parser, add_flags, add_run_flags, run_cli, settings_from
from llamagen_unitok.training.generator import GeneratorTraining, train_generator
from llamagen_unitok.training.loop import LoopConfig


def main(argv: list[str] | None = None) -> int:
    parser = Parser("Train a generator on codes; OUT/generator holds it, OUT/checkpoints what --resume needs.")
    add_run_flags(parser)
    parser.add_argument("--preview", metavar="TOKENIZER", help="draw pictures with this tokenizer at each checkpoint")
    add_flags(parser, GeneratorTraining)
    add_flags(parser, LoopConfig)
    flags = parser.parse_args(argv)

    def body() -> None:
        settings, loop = settings_from(GeneratorTraining, flags), settings_from(LoopConfig, flags)
        with processes(flags.device) as world:
            preview = None
            if flags.preview and world.is_main:
                from llamagen_unitok.pipeline import make_preview

                preview = make_preview(flags.preview, device=world.device)
            folder = train_generator(settings, loop, out=flags.out, resume=flags.resume, world=world, preview=preview)
            if world.is_main:
                print(folder)

    return run_cli(body)


if __name__ == "__main__":
    sys.exit(main())
