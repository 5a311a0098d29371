"""Plots of a generator's diagnostics: heat maps of its likelihood, histograms of its codes and of their nearness.

Each returns a matplotlib figure, which `plots.save_plot` writes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

PANELS_ACROSS = 4


def plot_likelihood(bits: Mapping[str, np.ndarray], grid: int) -> Figure:
    """Heat maps of bits per code, one for each codebook, and bars of their means.

    bits: name of the condition → (L, K). All maps have one scale, so that conditions can be compared.
    """
    codebooks = next(iter(bits.values())).shape[1]
    across = min(PANELS_ACROSS, codebooks)
    down = -(-codebooks // across)
    low, high = min(map(np.min, bits.values())), max(map(np.max, bits.values()))
    figure = Figure(figsize=(2.1 * across + 3.4, 2.1 * down * len(bits) + 0.6), layout="constrained")
    maps, bars = figure.subfigures(1, 2, width_ratios=(2.1 * across + 0.9, 2.5))
    parts = maps.subfigures(len(bits), 1, squeeze=False)[:, 0]
    for part, (name, values) in zip(parts, bits.items(), strict=True):
        axes = part.subplots(down, across, squeeze=False).flat
        for k, axis in enumerate(axes):
            if k >= codebooks:
                axis.axis("off")
                continue
            image = axis.imshow(values[:, k].reshape(grid, grid), vmin=low, vmax=high, cmap="viridis")
            axis.set_title(f"codebook {k}: {values[:, k].mean():.2f}", fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
        part.colorbar(image, ax=part.axes, label="bits per code", shrink=0.9)
        part.suptitle(name, fontsize=10)
    axis = bars.subplots()
    width = 0.8 / len(bits)
    for i, (name, values) in enumerate(bits.items()):
        axis.bar(np.arange(codebooks) + i * width, values.mean(axis=0), width, label=name)
    axis.set_xticks(np.arange(codebooks) + 0.4 - width / 2, range(codebooks))
    axis.set_xlabel("codebook")
    axis.set_ylabel("bits per code, mean over positions")
    axis.legend(fontsize=7)
    return figure


def plot_usage(data: np.ndarray, samples: np.ndarray, divergences: np.ndarray) -> Figure:
    """Share of each entry among the codes of data and of samples, entries in the order of their share in the data.

    data, samples: counts (K, V).   divergences: (K,) bits, for the titles.
    """
    codebooks, entries = data.shape
    across = min(PANELS_ACROSS, codebooks)
    down = -(-codebooks // across)
    figure = Figure(figsize=(2.8 * across, 2.2 * down + 0.4), layout="constrained")
    for k, axis in enumerate(figure.subplots(down, across, squeeze=False).flat):
        if k >= codebooks:
            axis.axis("off")
            continue
        order = np.argsort(-data[k], kind="stable")
        for name, counts, style in (("samples", samples[k], {"lw": 0.6}), ("data", data[k], {"lw": 1.4})):
            axis.plot(np.arange(1, entries + 1), counts[order] / max(1, counts.sum()), label=name, **style)
        axis.set_title(f"codebook {k}: {divergences[k]:.3f} bits apart", fontsize=8)
        axis.tick_params(labelsize=7)
        if k == 0:
            axis.legend(fontsize=7)
    figure.supxlabel("entries, most frequent in the data first", fontsize=8)
    figure.supylabel("share of codes", fontsize=8)
    return figure


def plot_nearness(shares: Mapping[str, np.ndarray]) -> Figure:
    """Histograms of the largest share of codes in common with a training entry. shares: name → (N,) in [0, 1]."""
    figure = Figure(figsize=(5.5, 3.2), layout="constrained")
    axis = figure.subplots()
    edges = np.linspace(0, 1, 41)
    for name, values in shares.items():
        weights = np.full(len(values), 1 / len(values))
        axis.hist(values, edges, weights=weights, alpha=0.6, label=f"{name} ({len(values)})")
    axis.set_xlabel("largest share of codes in common with a training entry")
    axis.set_ylabel("share of pictures")
    axis.legend(fontsize=8)
    return figure
