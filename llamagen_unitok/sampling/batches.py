"""How many pictures to generate at a time: as many as free memory holds, up to where more no longer pays."""

from __future__ import annotations

import argparse
import os

import torch
from torch import nn

from llamagen_unitok.config import GPTConfig
from llamagen_unitok.gpt import GPT
from llamagen_unitok.sampling.blocks import merged_bytes

# Of free memory; the rest is for workspaces, the decoder, and other programs.
SHARE = 0.6
# From here on a CPU's arithmetic, or a large GPU's reading of the caches, takes all of the time.
MOST = {"cpu": 32, "cuda": 512}


def number_or_auto(text: str) -> int | str:
    """An argparse type: a whole number, or "auto"."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor auto") from None


def picture_bytes(config: GPTConfig, itemsize: int, *, guided: bool) -> int:
    """Memory that one more picture in the batch takes: keys and values of all positions, and one step's activations."""
    keys_and_values = 2 * config.kv_heads * config.head_width * itemsize
    cached = keys_and_values * (config.layers * config.num_positions + config.depth_layers * config.num_codebooks)
    step = 8 * config.width + 3 * config.ffn_width
    logits = 8 * config.codebook_size  # in float32, with what filtering and drawing make of them
    return (cached + step * itemsize + logits * 4) * (2 if guided else 1)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken, on a CUDA device or in the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            kilobytes = next(line.split()[1] for line in file if line.startswith("MemAvailable"))
        return int(kilobytes) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def second_copy_bytes(gpt: GPT) -> int:
    """The most that an engine stores beside the weights: all matrices in another layout (packed), or merged ones."""
    if gpt.norm.weight.device.type != "cpu":
        return merged_bytes(gpt)
    matrices = (module.weight for module in gpt.modules() if isinstance(module, nn.Linear))
    return sum(matrix.nbytes for matrix in matrices)


def propose_batch_size(gpt: GPT, *, guided: bool, pictures: int | None = None, free: int | None = None) -> int:
    """The largest power of two whose batch fits into the memory that is free now (`free` bytes, if given), and no
    larger than `pictures` need.

    Codes depend on the batch size by rounding, so a run that is to be repeated exactly records it.
    """
    weight = gpt.norm.weight
    itemsize = weight.element_size() if weight.device.type == "cuda" else 4  # a CPU's caches are float32
    free = free_bytes(weight.device) if free is None else free
    room = SHARE * max(0, free - second_copy_bytes(gpt))
    fitting = int(room // picture_bytes(gpt.config, itemsize, guided=guided))
    most = MOST.get(weight.device.type, MOST["cpu"])
    size = 1 << (max(1, min(fitting, most)).bit_length() - 1)
    return size if pictures is None else min(size, 1 << (pictures - 1).bit_length())
