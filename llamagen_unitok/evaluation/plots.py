"""Figures of matplotlib as PNG files, drawn without a display."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from llamagen_unitok.runtime.files import replacing


def save_plot(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, complete or not at all."""
    with replacing(path) as file:
        FigureCanvasAgg(figure).print_png(file)
