"""Plots of a sweep's rows. Each returns a matplotlib figure, which `plots.save_plot` writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

Row = dict[str, Any]

_FONT = 7
_POINT = 5  # pixels around a point that no label may cover
_RADII = (9, 18, 30, 45, 65)  # points from a point to its label: the nearest free place is taken
_LINE_FROM = 18  # from here on a line leads from the label to its point


def plot_guidance(lines: Sequence[tuple[str, Sequence[Row]]], names: Sequence[str]) -> Figure:
    """The figures `names` over the guidance scale, a panel each. lines: (label, rows in ascending order of scale)."""
    figure = _figure()
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        for label, rows in lines:
            axes.plot([r["cfg_scale"] for r in rows], [r[name] for r in rows], marker="o", label=label or None)
        axes.set(xlabel="guidance scale", ylabel=name)
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(fontsize=_FONT)
    return figure


def plot_scatter(lines: Sequence[tuple[str, Sequence[Row]]], across: str, up: str, *, front: bool = False) -> Figure:
    """Every row a point in the colour of its line, with its guidance scale beside it; lines as in `plot_guidance`.

    front: draw the line of those that none beats (more `across`, less `up`) too.
    """
    figure = _figure()
    axes = figure.subplots()
    points: dict[str, tuple[float, float]] = {}
    labels = []
    for label, rows in lines:
        new = [row for row in rows if row["key"] not in points]  # one without guidance is on several lines
        points |= {row["key"]: (row[across], row[up]) for row in new}
        labels += [f"cfg {row['cfg_scale']:g}" for row in new]
        axes.scatter([r[across] for r in new], [r[up] for r in new], zorder=3, label=label or None)
    places = list(points.values())
    best = sorted(places[i] for i in pareto_front(places)) if front else []
    if best:
        axes.plot(*zip(*best, strict=True), linestyle="--", color="0.3", label="none is better in both")
    if best or len(lines) > 1:
        axes.legend(fontsize=_FONT)
    axes.set(xlabel=across, ylabel=up)
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    _place_labels(axes, places, labels, best)
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (score, distance) that no other beats in both: higher score, lower distance."""
    return [
        i
        for i, (score, distance) in enumerate(points)
        if not any(s >= score and d <= distance and (s, d) != (score, distance) for s, d in points)
    ]


def _figure() -> Figure:
    return Figure(figsize=(9, 4.2), dpi=120, layout="constrained")


def _place_labels(
    axes: Axes, points: Sequence[tuple[float, float]], labels: Sequence[str], line: Sequence[tuple[float, float]]
) -> None:
    """Write each label at the nearest place beside its point that covers no point, no other label and no line.

    Where there is none, at the place that covers least.
    """
    canvas = FigureCanvasAgg(axes.figure)
    canvas.draw()  # the layout has to stand before places can be compared
    renderer = canvas.get_renderer()
    taken = [_around(x, y, _POINT) for x, y in axes.transData.transform(points)]
    if line:
        ends = axes.transData.transform(line)
        taken += [_around(*(a + (b - a) * step / 40), 1) for a, b in pairwise(ends) for step in range(41)]
    if legend := axes.get_legend():
        taken.append(legend.get_window_extent(renderer))
    scale = axes.figure.dpi / 72  # pixels in a point
    for point, place, label in zip(points, axes.transData.transform(points), labels, strict=True):
        measured = axes.annotate(label, point, fontsize=_FONT)
        size = measured.get_window_extent(renderer).size
        measured.remove()
        places = [(radius, _beside(place, radius * scale, turn, size)) for radius in _RADII for turn in range(12)]

        def covered(candidate: tuple[float, Bbox]) -> int:
            box = candidate[1]
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
            inside = inside and axes.bbox.containsy(box.y0) and axes.bbox.containsy(box.y1)
            return sum(box.overlaps(other) for other in taken) + len(taken) * (not inside)

        radius, box = min(places, key=covered)
        text = axes.annotate(
            label,
            point,
            ((box.x0 - place[0]) / scale, (box.y0 - place[1]) / scale),
            textcoords="offset points",
            fontsize=_FONT,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "0.5"} if radius >= _LINE_FROM else None,
        )
        text.set_in_layout(False)
        taken.append(box)


def _beside(place: Sequence[float], radius: float, turn: int, size: Sequence[float]) -> Bbox:
    """The box of a text of `size` whose near edge is `radius` from a place, in twelfths of a turn; all in pixels."""
    corner = []
    for at, step, length in zip(place, (math.cos(turn * math.pi / 6), math.sin(turn * math.pi / 6)), size, strict=True):
        edge = at + radius * step
        corner.append(edge if step > 0.3 else edge - length if step < -0.3 else edge - length / 2)
    return Bbox.from_bounds(*corner, *size)


def _around(x: float, y: float, reach: float) -> Bbox:
    return Bbox.from_extents(x - reach, y - reach, x + reach, y + reach)
