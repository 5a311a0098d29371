"""Where this user's files are kept from one run to the next: downloads, features, built kernels."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "LLAMAGEN_UNITOK_CACHE"


def cache_folder() -> Path:
    """$LLAMAGEN_UNITOK_CACHE, else llamagen-unitok in $XDG_CACHE_HOME, else in ~/.cache."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "llamagen-unitok"
