"""Code shards of random codes, for tests that train a generator without a tokenizer."""

from pathlib import Path

import numpy as np

from llamagen_unitok.training.data import CodeMeta, shard_name, write_meta, write_shard
from modelfolder import file_hash
from tests.tiny_generator import TINY


def write_codes(
    folder: Path,
    *,
    count: int = 24,
    classes: int = 3,
    grid: int = 2,
    codebooks: int = 2,
    codebook_size: int = 16,
    views: tuple[str, ...] = ("a", "b", "c"),
    seed: int = 0,
) -> Path:
    """`count` entries in two shards; classes are called "class 0", "class 1", …"""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    sizes = [count // 2, count - count // 2]
    for index, size in enumerate(sizes):
        codes = rng.integers(0, codebook_size, (size, len(views), grid**2, codebooks))
        write_shard(folder, index, 2, codes, rng.integers(0, classes, size))
    write_meta(
        folder,
        CodeMeta(
            tokenizer="random",
            tokenizer_hash="0" * 64,
            img_size=16 * grid,
            grid=grid,
            num_codebooks=codebooks,
            codebook_size=codebook_size,
            views=list(views),
            class_names=[f"class {label}" for label in range(classes)],
            shard_sizes=sizes,
            checksums=[file_hash(folder / shard_name(i, 2)) for i in range(2)],
        ),
    )
    return folder


def random_codes(folder: Path, pictures: int = 12, views: tuple[str, ...] = ("centre",), seed: int = 0) -> Path:
    """Such shards for tests.tiny_generator.TINY."""
    return write_codes(
        folder,
        count=pictures,
        classes=TINY["num_classes"],
        grid=3,
        codebooks=TINY["num_codebooks"],
        codebook_size=TINY["codebook_size"],
        views=views,
        seed=seed,
    )
