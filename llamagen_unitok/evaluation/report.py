"""What a sweep found, for people: plots and a Markdown report, from the rows of its table.

Rows are compared with each other only where all is equal that a sweep does not vary: a *group*.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamagen_unitok.evaluation.extractors import Extractor
from llamagen_unitok.evaluation.figures import figure_name
from llamagen_unitok.evaluation.plots import save_plot
from llamagen_unitok.evaluation.sweep import lines_over_scale
from llamagen_unitok.evaluation.sweep_plots import plot_guidance, plot_scatter
from llamagen_unitok.runtime.files import replacing

REPORT_NAME, BEST_NAME = "report.md", "best.png"
# What a sweep varies: key of a row → head of its column, in the order of the table.
SETTINGS = {
    "checkpoint": "checkpoint",
    "cfg_scale": "cfg",
    "cfg_schedule": "schedule",
    "cfg_power": "power",
    "cfg_interval": "interval",
    "temperature": "temperature",
    "top_k": "top-k",
    "top_p": "top-p",
}
# What has to be equal where rows are compared, likewise.
CONDITIONS = {
    "num_samples": "samples",
    "seed": "seed",
    "labels": "labels",
    "resize": "resize",
    "batch_size": "batch",
    "engine": "engine",
    "decoder": "decoder",
    "dtype": "dtype",
    "device": "device",
    "gpu": "GPU",
    "generator_hash": "generator",
    "tokenizer_hash": "tokenizer",
}
ALWAYS_SHOWN = ("cfg_scale", "temperature", "num_samples")
MEASURED_WITH = ("extractor", "weights_hash", "reference_hash", "num_reference", "num_reference_rows")
_NAMES = {**SETTINGS, **CONDITIONS}
_FIGURES = ("FID", "sFID", "IS", "IS_std", "precision", "recall", "KID")

Row = dict[str, Any]


def write_report(rows: Sequence[Row], extractor: Extractor, out: Path) -> Path:
    """Write guidance.png, precision_recall.png, front.png, best.png and report.md into `out`; returns the report.

    rows: measured with `extractor` against one reference, each with its Fréchet distance. Plots show the group of most
    rows; one whose figures these lack is left out. The best is that of the group of most samples.
    """
    frechet, score = extractor.frechet_name, figure_name("IS", extractor)
    precision, recall = figure_name("precision", extractor), figure_name("recall", extractor)
    groups = [sorted(group, key=lambda row: row[frechet]) for group in comparable(rows)]
    groups.sort(key=lambda group: (-group[0]["num_samples"], -len(group)))
    plotted = max(groups, key=lambda group: (len(group), group[0]["num_samples"]))
    lines = labelled_lines(plotted)
    has = {name for name in (frechet, score, precision, recall) if all(name in row for row in plotted)}
    plots = {"guidance.png": plot_guidance(lines, [name for name in (frechet, score) if name in has])}
    if {precision, recall} <= has:
        plots["precision_recall.png"] = plot_scatter(lines, recall, precision)
    if score in has:
        plots["front.png"] = plot_scatter(lines, score, frechet, front=True)
    for name, plot in plots.items():
        save_plot(plot, out / name)
    best_picture = out / "pictures" / f"{groups[0][0]['key']}.png"
    if best_picture.exists():
        shutil.copyfile(best_picture, out / BEST_NAME)
    label, line = next(one for one in lines if plotted[0] in one[1])
    told = guidance_sentence(line, label, frechet, score if score in has else None)
    text = _markdown(groups, extractor, list(plots), told, best_picture.exists())
    with replacing(out / REPORT_NAME) as file:
        file.write(text.encode())
    return out / REPORT_NAME


def comparable(rows: Sequence[Row]) -> list[list[Row]]:
    """The groups of rows that can be compared."""
    names = differing(rows)
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        values = tuple(_text(row.get(name)) if _tells(name, row, rows) else None for name in names)
        groups.setdefault(values, []).append(row)
    return list(groups.values())


def differing(rows: Sequence[Row]) -> list[str]:
    """The conditions in which rows differ."""
    return [
        name
        for name in CONDITIONS
        if any(_tells(name, row, rows) for row in rows) and len({_text(row.get(name)) for row in rows}) > 1
    ]


def _tells(name: str, row: Row, rows: Sequence[Row]) -> bool:
    """Whether a condition says more than the checkpoint does: a bundle has its models, until they are replaced."""
    if not name.endswith("_hash"):
        return True
    return len({one[name] for one in rows if one["checkpoint"] == row["checkpoint"]}) > 1


def varying(rows: Sequence[Row]) -> list[str]:
    """The settings in which rows differ."""
    return [name for name in SETTINGS if len({row[name] for row in rows}) > 1]


def labelled_lines(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows of one group in lines over the guidance scale, each with what makes it another line."""
    names = [name for name in varying(rows) if name != "cfg_scale"]
    # the last row of a line has guidance, where one has; the first may belong to lines of several schedules
    return [(_label(line[-1], names), line) for line in lines_over_scale(rows)]


def guidance_sentence(line: Sequence[Row], label: str, frechet: str, score: str | None) -> str:
    """What guidance does along a line of rows of ascending scale, from their numbers; "" for fewer than two scales."""
    if len({row["cfg_scale"] for row in line}) < 2:
        return ""
    start = next((row for row in line if row["cfg_scale"] == 1), line[0])
    base = "without guidance" if start["cfg_scale"] == 1 else f"at scale {start['cfg_scale']:g}"

    def told(name: str, best: Row, better: str, never: str) -> str:
        first = f"{start[name]:.4g} {base}"
        if best is start:
            others = [row for row in line if row is not start]
            worst = max(others, key=lambda row: abs(row[name] - start[name]))
            return f"{name} {never} its {first} and is {worst[name]:.4g} at {worst['cfg_scale']:g}"
        return f"{name} {better} from {first} to {best[name]:.4g} at {best['cfg_scale']:g}"

    parts = [told(frechet, min(line, key=lambda row: row[frechet]), "falls", "is nowhere below")]
    if score:
        parts.append(told(score, max(line, key=lambda row: row[score]), "rises", "is nowhere above"))
    scales = ", ".join(f"{row['cfg_scale']:g}" for row in line)
    which = f" ({label})" if label else ""
    return f"Over the guidance scales {scales}{which}, {', and '.join(parts)}."


def _label(row: Row, names: Sequence[str]) -> str:
    return ", ".join(f"{_NAMES[name]} {_cell(name, row)}" for name in names)


def _markdown(
    groups: Sequence[Sequence[Row]], extractor: Extractor, plots: list[str], told: str, pictured: bool
) -> str:
    frechet, rows = extractor.frechet_name, [row for group in groups for row in group]
    conditions = differing(rows)
    shown = [name for name in SETTINGS if name in ALWAYS_SHOWN or name in varying(rows)]
    shown += [name for name in CONDITIONS if name in ALWAYS_SHOWN or name in conditions]
    figures = [name for name in (figure_name(n, extractor) for n in _FIGURES) if any(name in row for row in rows)]
    lines = ["# Sweep", ""]
    if len(groups) > 1:
        heads = ", ".join(CONDITIONS[name] for name in conditions)
        lines += [f"Rows that differ in {heads} do not compare: each such group has a best row of its own.", ""]
    for best in (group[0] for group in groups):
        lines += [f"Least {frechet}: **{best[frechet]:.4g}** at {_label(best, shown)}.", ""]
    lines += [told, ""] if told else []
    lines += ["Settings that have no column are the defaults of `sample.py`.", ""]
    lines += [_row([*(_NAMES[name] for name in shown), *figures]), _row(["---"] * (len(shown) + len(figures)))]
    for row in rows:
        numbers = [f"{row[name]:.4g}" if name in row else "-" for name in figures]
        lines.append(_row([*(_cell(name, row) for name in shown), *numbers]))
    lines.append("")
    for name in plots:
        lines += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})", ""]
    if pictured:
        lines += ["Samples of the best setting, spread evenly over the classes:", "", f"![samples]({BEST_NAME})", ""]
    warned = sorted({text for row in rows for text in row.get("warnings", [])})
    lines += [*(f"- Warning: {text}." for text in warned), ""] if warned else []
    lines += ["## Where the figures come from", ""]
    for name in (*MEASURED_WITH, *(name for name in CONDITIONS if name not in shown), "code_version", "command"):
        values = list(dict.fromkeys(_text(row[name]) for row in rows if row.get(name) is not None))
        if values:
            lines.append(f"- {name.replace('_', ' ')}: {', '.join(f'`{value}`' for value in values)}")
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(name: str, row: Row) -> str:
    text = _text(row.get(name))
    return text[:8] if name.endswith("_hash") else text


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(_text(one) for one in value.values())
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
