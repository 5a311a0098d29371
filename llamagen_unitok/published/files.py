"""Checkpoint files of other projects, read without running anything that is in them."""

from __future__ import annotations

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import torch

# The one place that says what a pickle may hold beside tensors, numbers, strings and containers: training scripts of
# LlamaGen and UniTok store their command line.
ALLOWED_CLASSES = [argparse.Namespace]


def read_checkpoint(path: Path) -> Any:
    """What a .pt or .pth file holds, on the CPU; tensors are mapped from the file and read when they are used.

    Raises ValueError, in one line, for a file that is missing, damaged, or asks for anything but data: such a file is
    refused before any of it runs.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        with torch.serialization.safe_globals(ALLOWED_CLASSES):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                # The format of before PyTorch 1.6 cannot be mapped.
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise ValueError(
                f"{path} is refused: loading it would call {asked[1]}, which no checkpoint needs; nothing was run"
            ) from None
        raise ValueError(f"{path} is refused: it is no checkpoint of tensors and numbers, or damaged") from None
    except Exception as error:  # whatever the unpickler trips over in bytes that are no pickle
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is no checkpoint file, or damaged or cut short ({reason})") from None
