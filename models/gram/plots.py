"""Plots of an evaluation: accuracy with intervals, calibration, and what answer length has to do with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Scorers = Mapping[str, Mapping[str, Any]]
"""Name of a scorer -> its figures as `metrics.evaluate_comparisons` gives them."""


def plot_sets(sets: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """The three plots of each evaluation set into a folder.

    Args:
        sets: Name of a set -> its part of the report, with the figures of its `scorers`.
        folder: Made if it is missing.
    """
    folder.mkdir(exist_ok=True)
    for name, figures in sets.items():
        plot_accuracy(figures["scorers"], folder / f"{name}_accuracy.png", title=name)
        plot_reliability(figures["scorers"], folder / f"{name}_reliability.png", title=name)
        plot_length_gap(figures["scorers"], folder / f"{name}_length_gap.png", title=name)


def plot_accuracy(scorers: Scorers, path: Path, *, title: str) -> None:
    """Bars of accuracy with their 95 % intervals; the dashed line is chance."""
    figure = Figure(figsize=(6.4, 0.8 + 0.45 * len(scorers)), layout="constrained")
    axes = figure.subplots()
    names = list(scorers)[::-1]
    values = [scorers[name]["accuracy"] for name in names]
    errors = [[v["value"] - v["low"] for v in values], [v["high"] - v["value"] for v in values]]
    axes.barh(names, [v["value"] for v in values], xerr=errors, capsize=3, color="tab:blue", alpha=0.8)
    axes.axvline(0.5, linestyle="--", color="gray")
    axes.set(xlim=(0, 1), xlabel="accuracy (share of pairs judged right)", title=title)
    figure.savefig(path, dpi=150)


def plot_reliability(scorers: Scorers, path: Path, *, title: str) -> None:
    """Accuracy against confidence; on the diagonal a confidence of 0.8 is right in 80 % of cases."""
    figure, axes = _square(title)
    axes.plot([0.5, 1], [0.5, 1], linestyle="--", color="gray", label="perfect calibration")
    for name, figures in scorers.items():
        points = figures["reliability"]
        label = f"{name} (ECE {figures['ece']:.3f})"
        axes.plot([p["confidence"] for p in points], [p["accuracy"] for p in points], marker="o", label=label)
    axes.set(xlabel="confidence max(p, 1 − p)", ylabel="accuracy", xlim=(0.48, 1.02), ylim=(-0.02, 1.02))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def plot_length_gap(scorers: Scorers, path: Path, *, title: str) -> None:
    """Accuracy by how much longer the chosen answer is; a scorer that only counts characters rises from 0 to 1."""
    figure, axes = _square(title)
    rows = next(iter(scorers.values()))["by_length_gap"]
    positions = np.arange(len(rows))
    for name, figures in scorers.items():
        axes.plot(positions, [row["accuracy"] for row in figures["by_length_gap"]], marker="o", label=name)
    labels = [f"{_edge(row['from'], '≥')}\n{_edge(row['to'], '<')}\n(n={row['count']})" for row in rows]
    axes.set_xticks(positions, labels, fontsize="x-small")
    axes.axhline(0.5, linestyle="--", color="gray")
    axes.set(xlabel="characters of chosen − rejected", ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def plot_best_of_n(
    scorers: Mapping[str, Sequence[Mapping[str, Any]]],
    path: Path,
    *,
    random: Sequence[float],
    oracle: Sequence[float],
    title: str,
) -> None:
    """Quality of the best of n against the bound of the KL divergence, with bands of the 95 % intervals.

    Args:
        scorers: Name of a scorer -> for each n a row with `n`, `kl`, `value`, `low` and `high`.
        path: Of the picture.
        random: Quality of an answer taken by chance, for each n.
        oracle: Quality of the best answer, for each n.
        title: Above it.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for scorer, rows in scorers.items():
        kl = [row["kl"] for row in rows]
        [line] = axes.plot(kl, [row["value"] for row in rows], marker="o", label=scorer)
        low, high = ([row[edge] for row in rows] for edge in ("low", "high"))
        axes.fill_between(kl, low, high, alpha=0.15, color=line.get_color())
    rows = next(iter(scorers.values()))
    kl = [row["kl"] for row in rows]
    axes.plot(kl, oracle, ":", color="gray", label="oracle")
    axes.plot(kl, random, "--", color="gray", label="random")
    axes.set(xlabel="KL bound, ln n − (n − 1)/n", ylabel="true score of the chosen answer", title=title)
    for row in rows:
        place, n = (row["kl"], 0), f"n={row['n']}"
        axes.annotate(n, place, xycoords=("data", "axes fraction"), fontsize="x-small", color="gray")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _square(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.grid(alpha=0.3)
    return figure, axes


def _edge(value: float | None, sign: str) -> str:
    return "" if value is None else f"{sign} {value:g}"
