"""Settings behind published figures: one row a table row of a paper. ``--preset NAME`` fixes all of them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

from llamagen_unitok.published.presets import GENERATORS
from llamagen_unitok.sampling import SamplingConfig


@dataclass(frozen=True)
class Preset:
    """How a published figure was sampled, and what it was. figures: as published, of the authors' weights."""

    source: str
    sampling: SamplingConfig
    figures: dict[str, float]
    num_samples: int = 50_000
    labels: str = "random"  # the published samplers draw them
    resize: str | None = None  # a value of --resize


def _llamagen(name: str, *, guided: bool = True) -> Preset:
    row = GENERATORS[name]
    resize = "256:bicubic" if row.image_size != 256 else None
    if guided:
        scale, fid, source = row.cfg_scale, row.fid, "LlamaGen's README.md and GETTING_STARTED.md"
    else:
        scale, (fid, source) = 1.0, row.fid_no_guidance
    return Preset(
        source=f"{source}: {row.image_size} pixels{', resized' if resize else ''}",
        sampling=SamplingConfig(cfg_scale=scale),
        figures={"FID": fid},
        resize=resize,
    )


# To add a published setting, add a row.
PRESETS: dict[str, Preset] = {
    "unitok-cfgfree": Preset(
        source="UniTok, arXiv 2502.20321, table 2: LlamaGen-XXL without guidance",
        sampling=SamplingConfig(temperature=0.9),
        figures={"FID": 2.51, "IS": 216.7, "precision": 0.82, "recall": 0.57},
    ),
    **{name: _llamagen(name) for name in GENERATORS},
    **{f"{name}-cfgfree": _llamagen(name, guided=False) for name, row in GENERATORS.items() if row.fid_no_guidance},
}


def apply_preset(name: str, flags: argparse.Namespace, given: set[str]) -> None:
    """Set every flag that a preset fixes. ValueError for an unknown name, for a flag in `given` that says another value
    (figures under a preset's name come from its settings), and without a checkpoint.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}")
    if flags.checkpoint is None:
        raise ValueError(
            f"--preset {name} needs --checkpoint: give the model that was measured so, the shipped one was not"
        )
    preset = PRESETS[name]
    fixed = {(f.metadata["flag"], f.name): getattr(preset.sampling, f.name) for f in fields(SamplingConfig)}
    del fixed["--seed", "seed"]
    for field in ("num_samples", "labels", "resize"):
        fixed["--" + field.replace("_", "-"), field] = getattr(preset, field)
    for (flag, dest), value in fixed.items():
        if dest in given and getattr(flags, dest) != value:
            raise ValueError(
                f"--preset {name} fixes {flag} at {value}, but {getattr(flags, dest)} is given: leave out one of them"
            )
        setattr(flags, dest, value)
