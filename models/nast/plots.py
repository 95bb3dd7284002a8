"""Plots of an evaluation: quality with intervals, and BLEU by length and by re-ordering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

Models = Mapping[str, Mapping[str, Any]]
"""Name of a model -> its figures in the report of `nast.evaluate`."""


def plot_scores(models: Models, path: Path, *, title: str) -> None:
    """Bars of BLEU and exact match with their 95 % intervals."""
    figure = Figure(figsize=(7.2, 1.0 + 0.45 * len(models)), layout="constrained")
    names = list(models)[::-1]
    for axes, key, label in zip(
        figure.subplots(1, 2, sharey=True), ("bleu", "exact_match"), ("BLEU", "exact match"), strict=True
    ):
        values = [models[name][key] for name in names]
        errors = [[v["value"] - v["low"] for v in values], [v["high"] - v["value"] for v in values]]
        errors = np.maximum(errors, 0.0)  # the middle of the bootstrap may lie a rounding away
        axes.barh(names, [v["value"] for v in values], xerr=errors, capsize=3, color="tab:blue", alpha=0.8)
        axes.set(xlabel=label, xlim=(0, None))
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def plot_buckets(
    models: Mapping[str, Sequence[Mapping[str, float]]], path: Path, *, title: str, label: str
) -> None:
    """BLEU of each bucket, one line a model."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    rows = next(iter(models.values()))
    positions = np.arange(len(rows))
    for name, buckets in models.items():
        axes.plot(positions, [row["score"] for row in buckets], marker="o", label=name)
    labels = [_range(row) + f"\n(n={row['count']:.0f})" for row in rows]
    axes.set_xticks(positions, labels, fontsize="small")
    axes.set(xlabel=label, ylabel="BLEU", title=title, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _range(row: Mapping[str, float]) -> str:
    return f"{row['from']:g}" if row["from"] == row["to"] else f"> {row['from']:g}, ≤ {row['to']:g}"
