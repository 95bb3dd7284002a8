"""Plots of a selection: where the cut falls, and what the selection is made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def plot_scores(scores_N: np.ndarray, chosen: np.ndarray, path: Path, *, title: str, label: str) -> None:
    """Histogram of the scores of all rows and of those chosen; the dashed line is the last row that was taken."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    edges = np.histogram_bin_edges(scores_N, bins=min(60, max(5, len(scores_N) // 5)))
    axes.hist(scores_N, bins=list(edges), alpha=0.5, label=f"pool ({len(scores_N)})")
    if len(chosen):
        axes.hist(scores_N[chosen], bins=list(edges), alpha=0.8, label=f"selected ({len(chosen)})")
        axes.axvline(float(scores_N[chosen[-1]]), linestyle="--", color="gray", label="cut")
    axes.set(xlabel=label, ylabel="rows", title=title)
    axes.legend(fontsize="small", loc="upper right")
    figure.savefig(path, dpi=120)


def plot_sources(sources: Mapping[str, Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Share of every source in the pool and in the selection."""
    names = sorted(sources)
    figure = Figure(figsize=(6.4, 1.2 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(names))
    for offset, key, label in ((-0.2, "share_of_pool", "pool"), (0.2, "share_of_selection", "selected")):
        axes.barh(places + offset, [sources[name][key] for name in names], height=0.4, label=label)
    axes.set_yticks(places, names)
    axes.set(xlim=(0, 1), xlabel="share of rows", title=title)
    axes.legend(fontsize="small", loc="upper right")
    figure.savefig(path, dpi=120)
