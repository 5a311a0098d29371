"""What every test stands on: a fixed number of threads, and bundles small enough to sample in milliseconds."""

import shutil
from pathlib import Path

import pytest
import torch

from llamagen_unitok.labels import ClassNames
from llamagen_unitok.pipeline import ImageGenerator
from tests.tiny_generator import TINY, tiny_gpt
from tokenizer import UniTok, UniTokConfig

torch.set_num_threads(2)

NAMES = ["dog", "zebra face", "pig", "hot dog, plain", "cat"]
ALIASES = {"doggo": 0, "🐕": 0, "🐷": 2, "☺️": 4}


def tiny_tokenizer(seed: int = 0, **changes) -> UniTok:
    """A random tokenizer that fits tests.tiny_generator.TINY: K=3, V=11, a 3×3 grid of 48×48 pixels."""
    config = {
        "img_size": 48,
        "stem_width": 8,
        "conv_widths": (8, 16),
        "conv_depths": (1, 1),
        "width": 24,
        "depth": 1,
        "heads": 2,
        "num_codebooks": TINY["num_codebooks"],
        "codebook_size": TINY["codebook_size"],
        "code_width": 4,
        "embed_dim": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = UniTok(UniTokConfig(**{**config, **changes}))
        tokenizer.init_weights()
    return tokenizer.eval()


def tiny_generator(**changes) -> ImageGenerator:
    """Names, generator and tokenizer of five classes; `changes` go to the generator's config."""
    return ImageGenerator(tiny_gpt(**changes), tiny_tokenizer(), ClassNames(NAMES, ALIASES), card="# Tiny\n")


@pytest.fixture(scope="module")
def one_thread():
    """For what is promised bit for bit on one thread only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Nothing is kept in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


@pytest.fixture(scope="session")
def bundle(tmp_path_factory) -> Path:
    """A bundle on disk, for reading only."""
    return tiny_generator().save_pretrained(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def bundle_without_null_class(tmp_path_factory) -> Path:
    """Like `bundle`, but its generator was trained without label dropout."""
    return tiny_generator(has_null_class=False).save_pretrained(tmp_path_factory.mktemp("bundles") / "no-null")


@pytest.fixture
def damaged_bundle(bundle, tmp_path) -> Path:
    """A copy of `bundle` whose generator weights end in the middle."""
    copy = Path(shutil.copytree(bundle, tmp_path / "damaged"))
    weights = copy / "generator" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return copy
