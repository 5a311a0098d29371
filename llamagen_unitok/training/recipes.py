"""Published training recipes as rows of one table, and what becomes of a command line that names one.

Order of precedence: what the command line says, then the recipe, then the defaults of the settings.
"""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class Recipe(NamedTuple):
    """source: where it was published.   views: per picture in the shards.   values: settings, by field name."""

    source: str
    views: int
    values: dict[str, Any]


_COMMON = {
    "lr_schedule": "constant",
    "warmup_steps": 0,
    "epochs": 300,
    "weight_decay": 0.05,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "ema": 0.0,
    "dropout": 0.1,
    "precision": "bf16",
}

RECIPES: dict[str, Recipe] = {
    "llamagen": Recipe(
        "LlamaGen, arXiv 2406.06525",
        views=10,
        values={**_COMMON, "batch_size": 256, "lr": 1e-4, "class_dropout": 0.1},
    ),
    "unitok-cfgfree": Recipe(
        "LlamaGen-UniTok without guidance, UniTok, arXiv 2502.20321",
        views=10,
        values={
            **{name: value for name, value in _COMMON.items() if name != "warmup_steps"},
            "model": "XXL",
            "depth_layers": 4,
            "batch_size": 1024,
            "lr": 3e-4,
            "lr_schedule": "cosine",
            "warmup_share": 0.03,
            "class_dropout": 0.0,
        },
    ),
}

# Two ways of saying one thing: naming one on the command line takes the other out of the recipe.
_EITHER = (("steps", "epochs"), ("warmup_steps", "warmup_share"))


@dataclass(frozen=True)
class Plan:
    """How a command line arrives at its settings."""

    recipe: str | None = field(
        default=None, metadata={"help": f"{', '.join(RECIPES)}, or a .json file; other flags override it"}
    )
    epochs: float | None = field(default=None, metadata={"help": "passes over the training pictures, for --steps"})
    warmup_share: float | None = field(
        default=None, metadata={"help": "share of the steps that warm up, 0 to 1, for --warmup-steps"}
    )

    def __post_init__(self) -> None:
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ValueError(f"--epochs must be above 0, not {self.epochs}")
        if self.warmup_share is not None and not 0 <= self.warmup_share < 1:
            raise ValueError(f"--warmup-share must lie in [0, 1), not {self.warmup_share}")


class Resolved(NamedTuple):
    """values: every setting, by field name.   differs: recipe's setting → (recipe's value, value of this run)."""

    values: dict[str, Any]
    recipe: str | None
    source: str | None
    differs: dict[str, tuple[Any, Any]]

    def take(self, settings: type) -> Any:
        """The dataclass with its share of the values; its own checks raise ValueError."""
        return settings(**{f.name: self.values[f.name] for f in dataclasses.fields(settings)})


def read_recipe(name: str) -> Recipe:
    """A row of the table, or a JSON file of settings by field name. ValueError for neither."""
    if name in RECIPES:
        return RECIPES[name]
    if not name.endswith(".json"):
        raise ValueError(f"--recipe {name} is not known: use {', '.join(RECIPES)}, or a .json file of settings")
    try:
        values = json.loads(Path(name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--recipe {name}: there is no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--recipe {name} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f'--recipe {name} must hold one JSON object of settings, such as {{"lr": 1e-4}}')
    return Recipe(name, views=0, values=values)


def resolve(flags: dict[str, Any], given: Iterable[str], settings: Iterable[type]) -> Resolved:
    """Put together what the command line names (`given`), its recipe, and the defaults.

    flags: value of every field of `settings` and Plan, as parsed.   settings: the dataclasses that a recipe may set.
    --epochs and --warmup-share are not steps yet: see `count_steps`.
    Raises ValueError for an unknown recipe, a recipe with an unknown key or a value of another type than the
    setting's, and for both ways of saying one thing.
    """
    given = set(given)
    defaults = {f.name: f for kind in (*settings, Plan) for f in dataclasses.fields(kind)}
    values = {name: flags[name] for name in defaults}
    for pair in _EITHER:
        if given.issuperset(pair):
            raise ValueError(f"--{_dashed(pair[0])} and --{_dashed(pair[1])} say the same thing: give one of them")
    if values["recipe"] is None:
        return Resolved(values, None, None, {})
    recipe = read_recipe(values["recipe"])
    for pair in _EITHER:
        if recipe.values.keys() >= set(pair):
            raise ValueError(f"recipe {values['recipe']} sets {pair[0]} and {pair[1]}, which say the same: keep one")
    unknown = sorted(recipe.values.keys() - defaults.keys() | recipe.values.keys() & {"recipe"})
    if unknown:
        raise ValueError(f"recipe {values['recipe']} has unknown settings {unknown}: known are {sorted(defaults)}")
    replaced = {other for one, two in _EITHER for named, other in ((one, two), (two, one)) if named in given}
    for name, value in recipe.values.items():
        if name not in given | replaced:
            values[name] = _of_type(name, value, defaults[name].type, values["recipe"])
    differs = {
        name: (value, None if name in replaced else values[name])
        for name, value in recipe.values.items()
        if name in replaced or (name in given and values[name] != value)
    }
    return Resolved(values, values["recipe"], recipe.source, differs)


def count_steps(resolved: Resolved, pictures: int, views: int | None = None) -> Resolved:
    """The same with --epochs as steps and --warmup-share as warm-up steps.

    pictures: those trained on, held-out ones excluded.   views: per picture in the shards, if they are known.
    """
    values, differs = dict(resolved.values), dict(resolved.differs)
    batch = max(1, values["batch_size"])  # what is below is refused with the other settings
    if values["epochs"] is not None:
        values["steps"] = max(1, math.ceil(values["epochs"] * pictures / batch))
    if values["warmup_share"] is not None:
        values["warmup_steps"] = round(values["warmup_share"] * values["steps"])
    wanted = read_recipe(resolved.recipe).views if resolved.recipe else 0
    if wanted and views is not None and views != wanted:
        differs["views of each picture"] = (wanted, views)
    return resolved._replace(values=values, differs=differs)


def describe(resolved: Resolved, width: int = 118) -> str:
    """The settings of a run in a few lines, and what differs from its recipe."""
    settings = ", ".join(f"{name} {_shown(value)}" for name, value in resolved.values.items() if value is not None)
    lines = [textwrap.fill(settings, width, initial_indent="settings: ", subsequent_indent="  ")]
    if resolved.recipe:
        line = f"recipe {resolved.recipe} ({resolved.source}), {differences(resolved)}"
        lines.append(textwrap.fill(line, width, subsequent_indent="  "))
    return "\n".join(lines)


def differences(resolved: Resolved) -> str:
    """What a run does otherwise than its recipe, in words."""
    differs = ", ".join(
        f"{name} {_shown(ours)} instead of {_shown(theirs)}" for name, (theirs, ours) in resolved.differs.items()
    )
    return f"differing in: {differs}" if differs else "followed in every setting"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _of_type(name: str, value: Any, kind: str, recipe: str) -> Any:
    """`value`, checked against a field's annotation such as ``int | None``."""
    accepted = {part.strip() for part in kind.split("|")}
    allowed = {"float": (float, int), "int": int, "bool": bool, "str": str, "None": type(None), "Path": str}
    if not any(isinstance(value, allowed[part]) and isinstance(value, bool) == (part == "bool") for part in accepted):
        raise ValueError(f"recipe {recipe}: {name} must be {kind}, not {value!r}")
    return Path(value) if "Path" in accepted and isinstance(value, str) else value
