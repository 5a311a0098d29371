"""Names of tensors without what training wrappers put into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# torch.compile, DDP, FSDP1 and activation checkpointing.
ADDED_PARTS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def plain_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same values under the names that the unwrapped model gives them."""
    return {".".join(part for part in name.split(".") if part not in ADDED_PARTS): v for name, v in state.items()}
