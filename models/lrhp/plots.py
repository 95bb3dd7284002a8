"""Plots of LRHP: the map of representations, predicted margins, baselines and label budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

Projection = Literal["pca", "tsne"]
_COLOURS = 10


def project(v_ND: np.ndarray, how: Projection, *, seed: int = 0) -> np.ndarray:
    """Two coordinates [N, 2] of each representation."""
    if how == "pca" or len(v_ND) < 5:
        return PCA(2, random_state=seed).fit_transform(v_ND)
    return TSNE(2, perplexity=min(30, (len(v_ND) - 1) / 3), init="pca", random_state=seed).fit_transform(v_ND)


def plot_map(xy_N2: np.ndarray, labels: Sequence[str], path: Path, *, title: str) -> None:
    """A dot a pair, coloured by label; the rarest labels share one grey."""
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots()
    by_count = sorted(set(labels), key=lambda label: (-list(labels).count(label), label))
    names = np.array(labels)
    for i, label in enumerate(by_count[:_COLOURS]):
        rows = names == label
        axes.scatter(*xy_N2[rows].T, s=8, alpha=0.7, color=f"C{i}", label=f"{label} ({rows.sum()})")
    if rest := by_count[_COLOURS:]:
        rows = np.isin(names, rest)
        axes.scatter(*xy_N2[rows].T, s=8, alpha=0.5, color="gray", label=f"others ({rows.sum()})")
    axes.set(title=title, xticks=[], yticks=[])
    axes.legend(fontsize="small", markerscale=2)
    figure.savefig(path, dpi=150)


def plot_predictions(predicted_N: np.ndarray, label_N: np.ndarray, path: Path, *, title: str) -> None:
    """Predicted against labelled margins; the diagonal is perfect."""
    figure = Figure(figsize=(5.2, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], linestyle="--", color="gray")
    axes.scatter(label_N, predicted_N, s=10, alpha=0.5)
    axes.set(xlabel="labelled margin", ylabel="predicted margin", title=title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def plot_spearman(predictors: Mapping[str, Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Bars of rank correlation with their 95 % intervals, predictors and baselines."""
    figure = Figure(figsize=(6.4, 0.8 + 0.4 * len(predictors)), layout="constrained")
    axes = figure.subplots()
    names = list(predictors)[::-1]
    values = [predictors[name]["spearman"] for name in names]
    errors = [
        [max(0.0, v["value"] - v["low"]) for v in values],
        [max(0.0, v["high"] - v["value"]) for v in values],
    ]
    axes.barh(names, [v["value"] for v in values], xerr=errors, capsize=3, color="tab:blue", alpha=0.8)
    axes.axvline(0, color="gray", linestyle="--")
    axes.set(xlabel="Spearman correlation with the labelled margin", title=title)
    figure.savefig(path, dpi=150)


def plot_budgets(budgets: Mapping[int, Mapping[str, Mapping[str, float]]], path: Path, *, title: str) -> None:
    """Rank correlation by number of labelled pairs, one line a predictor."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for name in next(iter(budgets.values())):
        axes.plot(
            list(budgets), [figures[name]["spearman"] for figures in budgets.values()], marker="o", label=name
        )
    axes.set(xscale="log", xlabel="labelled pairs", ylabel="Spearman correlation", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
