"""Going on from a checkpoint: which settings must be those of the run, and which may change on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamagen_unitok.runtime.checkpoint import complete_checkpoints, read_meta

# They change what is computed: told when a run is continued, and kept in its checkpoints.
TOLD = ("steps", "lr", "lr_schedule", "warmup_steps", "grad_clip", "precision")
# They change how it is computed, and what is kept.
FREE = (
    "workers", "log_every", "save_every", "keep", "keep_every", "async_save",
    "accumulate", "parallel", "shard_size", "checkpoint_activations", "compile",
)  # fmt: skip
CHANGES = "changes"


def changed_settings(found: Path, meta: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings under ``meta["loop"]`` that are other than when the checkpoint `found` was written.

    Each as JSON: step (of the checkpoint), setting, before, after. ValueError, in one line, when anything differs that
    may not, or when the checkpoint is past the last step.
    """
    saved = read_meta(found)
    step, before = int(saved["step"]), _flat(saved)
    differing = {name: (before.get(name), value) for name, value in _flat(meta).items() if before.get(name) != value}
    told = {name.removeprefix("loop."): values for name, values in differing.items() if name.startswith("loop.")}
    told = {name: values for name, values in told.items() if name in TOLD}
    refused = [
        f"{name} {_short(there)} there, {_short(now)} now"
        for name, (there, now) in differing.items()
        if name.removeprefix("loop.") not in told
    ]
    if refused:
        raise ValueError(
            f"{found.parent.parent} holds a run with other settings ({'; '.join(refused[:3])}): "
            "give the same ones, or another --out"
        )
    if step > meta["loop"]["steps"]:
        raise ValueError(f"{found} is past --steps {meta['loop']['steps']}: give at least {step}, or another --out")
    return [{"step": step, "setting": name, "before": there, "after": now} for name, (there, now) in told.items()]


def told_change(change: dict[str, Any]) -> str:
    """One line about a row of `changed_settings`."""
    flag = change["setting"].replace("_", "-")
    return f"from step {change['step']} on: --{flag} {change['after']} instead of {change['before']}"


def earlier_changes(found: Path) -> list[dict[str, Any]]:
    """The changes that led to the checkpoint `found`, oldest first."""
    return read_meta(found).get(CHANGES, [])


def check_newest(out: Path, found: Path) -> None:
    """ValueError where the run in `out` has checkpoints after the one to go on from: they would be mixed up."""
    newer = [path.name for path in complete_checkpoints(out) if path.name > found.name]
    if newer:
        raise ValueError(
            f"{out / 'checkpoints'} holds checkpoints after {found.name} ({', '.join(newer)}): move them away to go on "
            "from there, or give another --out"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:39] + "…"
