"""What a sweep found, for people: plots and a Markdown report, from the rows of its table."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llamagen_unitok.evaluation.extractors import Extractor
from llamagen_unitok.evaluation.figures import figure_name
from llamagen_unitok.runtime.files import replacing

REPORT_NAME, BEST_NAME = "report.md", "best.png"
# Flag and short name of what a row is sampled with, in the order of the table.
SETTINGS = {
    "checkpoint": "checkpoint",
    "cfg_scale": "cfg",
    "cfg_schedule": "schedule",
    "cfg_power": "power",
    "cfg_interval": "interval",
    "temperature": "temperature",
    "top_k": "top-k",
    "top_p": "top-p",
    "num_samples": "samples",
}
ALWAYS_SHOWN = ("cfg_scale", "temperature", "num_samples")

Row = dict[str, Any]


def write_report(rows: Sequence[Row], extractor: Extractor, out: Path) -> Path:
    """Write guidance.png, precision_recall.png, front.png, best.png and report.md into `out`; returns the report.

    rows: of one sweep, measured with `extractor` against one reference. A plot whose figures the rows lack is left out.
    Plots show rows of one number of samples, that of most rows; the best is among those of most samples.
    """
    frechet, score = extractor.frechet_name, figure_name("IS", extractor)
    precision, recall = figure_name("precision", extractor), figure_name("recall", extractor)
    ordered = sorted(rows, key=lambda row: (-row["num_samples"], row[frechet]))
    counts = Counter(row["num_samples"] for row in rows)
    plotted = [row for row in rows if row["num_samples"] == max(counts, key=lambda count: (counts[count], count))]
    plots = []
    for name, needed, draw in (
        ("guidance.png", (frechet,), lambda figure: _guidance(figure, plotted, frechet, score)),
        ("precision_recall.png", (precision, recall), lambda figure: _scatter(figure, plotted, recall, precision)),
        ("front.png", (score, frechet), lambda figure: _scatter(figure, plotted, score, frechet, front=True)),
    ):
        if all(figure in row for row in plotted for figure in needed):
            _save_plot(draw, out / name)
            plots.append(name)
    best_picture = out / "pictures" / f"{ordered[0]['key']}.png"
    if best_picture.exists():
        shutil.copyfile(best_picture, out / BEST_NAME)
    with replacing(out / REPORT_NAME) as file:
        file.write(_markdown(ordered, extractor, plots, best_picture.exists()).encode())
    return out / REPORT_NAME


def varying(rows: Sequence[Row]) -> list[str]:
    """The settings in which rows differ."""
    return [name for name in SETTINGS if len({row[name] for row in rows}) > 1]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (score, distance) that no other beats in both: higher score, lower distance."""
    return [
        i
        for i, (score, distance) in enumerate(points)
        if not any(s >= score and d <= distance and (s, d) != (score, distance) for s, d in points)
    ]


def _save_plot(draw: Callable[[Any], None], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _label(row: Row, names: Sequence[str]) -> str:
    return ", ".join(f"{SETTINGS[name]} {_text(row[name])}" for name in names)


def _guidance(figure: Any, rows: Sequence[Row], frechet: str, score: str) -> None:
    """One line a group of rows that differ in the guidance scale only."""
    names = [name for name in varying(rows) if name != "cfg_scale"]
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["cfg_scale"]):
        groups.setdefault(_label(row, names), []).append(row)
    wanted = [name for name in (frechet, score) if all(name in row for row in rows)]
    for name, axes in zip(wanted, figure.subplots(1, len(wanted), squeeze=False)[0], strict=True):
        for label, group in groups.items():
            axes.plot([r["cfg_scale"] for r in group], [r[name] for r in group], marker="o", label=label or None)
        axes.set(xlabel="guidance scale", ylabel=name)
        axes.grid(alpha=0.3)
        if len(groups) > 1:
            axes.legend(fontsize=7)


def _scatter(figure: Any, rows: Sequence[Row], across: str, up: str, front: bool = False) -> None:
    """Every row a point, lettered with what makes it different; with `front`, the line of those that none beats."""
    axes = figure.subplots()
    names = varying(rows)
    axes.scatter([r[across] for r in rows], [r[up] for r in rows])
    for row in rows:
        axes.annotate(_label(row, names), (row[across], row[up]), (4, 4), textcoords="offset points", fontsize=7)
    if front:
        best = sorted((rows[i] for i in pareto_front([(r[across], r[up]) for r in rows])), key=lambda r: r[across])
        axes.plot([r[across] for r in best], [r[up] for r in best], linestyle="--", label="none is better in both")
        axes.legend(fontsize=7)
    axes.set(xlabel=across, ylabel=up)
    axes.margins(0.15)
    axes.grid(alpha=0.3)


def _markdown(ordered: Sequence[Row], extractor: Extractor, plots: list[str], pictured: bool) -> str:
    best = ordered[0]
    shown = [name for name in SETTINGS if name in ALWAYS_SHOWN or name in varying(ordered)]
    figures = [
        name
        for name in (figure_name(n, extractor) for n in ("FID", "sFID", "IS", "IS_std", "precision", "recall", "KID"))
        if all(name in row for row in ordered)
    ]
    lines = [
        "# Sweep",
        "",
        f"Least {extractor.frechet_name}: **{best[extractor.frechet_name]:.4g}** at "
        f"{_label(best, shown)} (settings not named: the defaults of `sample.py`).",
        "",
        _row([*(SETTINGS[name] for name in shown), *figures]),
        _row(["---"] * (len(shown) + len(figures))),
        *(_row([*(_text(row[name]) for name in shown), *(f"{row[name]:.4g}" for name in figures)]) for row in ordered),
        "",
    ]
    for name in plots:
        lines += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})", ""]
    if pictured:
        lines += ["The first samples of the best setting:", "", f"![samples]({BEST_NAME})", ""]
    warned = sorted({text for row in ordered for text in row.get("warnings", [])})
    lines += [*(f"- Warning: {text}." for text in warned), ""] if warned else []
    constant = ("extractor", "weights_hash", "reference_hash", "num_reference", "labels", "batch_size", "seed", "dtype")
    lines += ["## Where the figures come from", ""]
    for name in (*constant, "device", "generator_hash", "tokenizer_hash", "code_version", "command"):
        values = list(dict.fromkeys(_text(row[name]) for row in ordered if name in row))
        lines.append(f"- {name.replace('_', ' ')}: {', '.join(f'`{value}`' for value in values)}")
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
