"""Checkpoint files as other projects publish them, with small or seeded weights."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from tests.conftest import tiny_tokenizer
from tests.golden.fill import seeded_fill
from tests.tiny_generator import tiny_gpt
from tests.tiny_vqgan import tiny_vqgan

GOLDEN = Path(__file__).parent / "golden"
# The published feed-forward widths are multiples of 256, which is not written down in a state dict.
PUBLISHED = {"ffn_multiple": 256, "num_classes": 1000}
TRAINING_ARGS = {"gpt_model": "GPT-B", "image_size": 64, "downsample_size": 16, "num_classes": 1000, "ema": False}


def single_gpt(**changes):
    """A tiny LlamaGen generator: K=1, V=11, a 4×4 grid, 1,000 classes and the null class."""
    return tiny_gpt(**{**PUBLISHED, "num_codebooks": 1, "depth_layers": 0, "num_positions": 16, **changes})


def several_gpt(**changes):
    """A tiny UniTok-LlamaGen generator that fits tests.conftest.tiny_tokenizer: K=3, V=11, a 3×3 grid."""
    return tiny_gpt(**{**PUBLISHED, **changes})


def ddp_file(state: dict, **args) -> dict:
    """What train_c2i.py writes."""
    return {"model": state, "optimizer": {"state": {}}, "steps": 7, "args": argparse.Namespace(**TRAINING_ARGS | args)}


# Everything a published generator's state dict comes wrapped in: state dict → what torch.save gets.
WRAPPINGS = {
    "ddp": ddp_file,
    "fsdp (bare)": lambda state: dict(state),
    "model": lambda state: {"model": state},
    "module": lambda state: {"module": state},
    "state_dict": lambda state: {"state_dict": state},
    "compiled": lambda state: {"model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()}},
    "compiled in ddp": lambda state: {"model": {f"module._orig_mod.{name}": t for name, t in state.items()}},
    "fsdp wrapped": lambda state: {
        name.replace("layers.0.", "layers.0._fsdp_wrapped_module."): tensor for name, tensor in state.items()
    },
    "rotation table": lambda state: {"model": {**state, "freqs_cis": torch.zeros(grid_rows(state), 4, 2)}},
}


def grid_rows(state: dict) -> int:
    """Rows of the rotation table that a tiny generator of this state would store."""
    return 1 + (16 if "tok_embeddings.weight" in state else 9)


def vq_file(tokenizer=None) -> dict:
    """What vq_ds16_c2i.pt holds."""
    state = (tokenizer or tiny_vqgan()).state_dict()
    return {"model": {**state, "quantize.codebook_used": torch.zeros(65536)}}


def unitok_args(tokenizer) -> dict:
    """The published arguments that describe a tokenizer, of a size that is in tokenizer.config.PRESETS."""
    config = tokenizer.config
    return {
        "model": "vitamin_base",
        "img_size": config.img_size,
        "vocab_size": config.num_codebooks * config.codebook_size,
        "vocab_width": config.latent_width,
        "num_codebooks": config.num_codebooks,
        "quant_proj": config.projection,
        "embed_dim": config.embed_dim,
        "dtype": torch.bfloat16,
    }


def unitok_file(tokenizer=None) -> dict:
    """What unitok_tokenizer.pth holds."""
    tokenizer = tokenizer or tiny_tokenizer()
    return {"args": unitok_args(tokenizer), "trainer": {"unitok": tokenizer.state_dict()}}


def seeded_state(keys: str) -> dict[str, torch.Tensor]:
    """The golden weights of a published model; keys: its file in tests/golden."""
    entries = json.loads((GOLDEN / keys).read_text())["entries"]
    return {e["name"]: torch.from_numpy(np.asarray(seeded_fill(e["name"], e["shape"]))) for e in entries}


def save(value, path: Path) -> Path:
    torch.save(value, path)
    return path
