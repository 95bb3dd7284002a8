"""Pictures of a sweep: metrics against each varied key, all keys side by side, the metric over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from eagleray.platform.space import Space, shown
from eagleray.platform.sweep_results import PointResult, TrialRecord

_LEGEND_UP_TO = 20
_LOG_FROM = 50
"""Largest over least value from which a key of positive numbers has a logarithmic axis."""
_STOPPED = {"marker": "x", "linestyle": "", "color": "0.5", "label": "stopped early"}


def plot_by_value(
    results: Sequence[PointResult], space: Space, key: str, metrics: Sequence[str], out: Path
) -> Path | None:
    """One panel a metric: its value over the values of a key, with a curve if nothing else varies.

    Error bars are 95 % intervals over seeds. Points that were stopped early are crosses off the curve: they
    have seen less training.

    Returns:
        `out`, or `None` if the key's values are not numbers or none of the metrics was evaluated.
    """
    shown_points = [result for result in results if result.metrics]
    names = [name for name in metrics if any(name in result.metrics for result in shown_points)]
    if not names or not all(_is_number(result.point[key]) for result in shown_points):
        return None
    figure = Figure(figsize=(4.6 * len(names), 3.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False).flat, names, strict=True):
        have = sorted((r for r in shown_points if name in r.metrics), key=lambda r: r.point[key])
        whole = [r for r in have if r.status == "finished"]
        cut = [r for r in have if r.status != "finished"]
        bars = [r.interval or 0.0 for r in whole] if name == space.metric else None
        axes.errorbar(
            [r.point[key] for r in whole],
            [r.metrics[name] for r in whole],
            yerr=bars if bars and any(bars) else None,
            marker="o",
            linestyle="-" if len(space.varied) == 1 else "",
            capsize=3,
            label="finished",
        )
        if cut:
            axes.plot([r.point[key] for r in cut], [r.metrics[name] for r in cut], **_STOPPED)
            axes.legend(fontsize="small")
        axes.ticklabel_format(useOffset=False)
        axes.set_xlabel(key)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)
    return out


def plot_over_time(trials: Sequence[TrialRecord], space: Space, out: Path) -> Path:
    """The selecting metric of every trial over its steps; a cross marks where one was stopped or failed."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for index, trial in enumerate(trials):
        records = [record for record in trial.evaluations if record.get(space.metric) is not None]
        steps, values = [r["step"] for r in records], [r[space.metric] for r in records]
        point = ", ".join(shown(trial.point[key]) for key in space.varied)
        color = f"C{index % 10}"
        axes.plot(steps, values, marker="o", markersize=3, color=color, label=f"{trial.name}: {point}")
        if trial.status != "finished" and records:
            axes.plot(steps[-1:], values[-1:], marker="x", markersize=9, color=color)
    axes.set_xlabel("Optimiser step")
    axes.set_ylabel(f"Evaluation: {space.metric}")
    axes.grid(alpha=0.3)
    if len(trials) <= _LEGEND_UP_TO:
        axes.legend(fontsize="small", title=", ".join(space.varied))
    figure.savefig(out, dpi=120)
    return out


def plot_parallel(results: Sequence[PointResult], space: Space, out: Path) -> Path | None:
    """Parallel coordinates: one line a point through its value of every varied key, to the metric that it reached.

    The colour is the metric; dotted lines are points that were stopped early or failed in a seed.

    Returns:
        `out`, or `None` if no point has the metric.
    """
    shown_points = [result for result in results if space.metric in result.metrics]
    if not shown_points:
        return None
    names = [*space.varied, space.metric]
    columns = [[result.point[key] for result in shown_points] for key in space.varied]
    columns.append([result.metrics[space.metric] for result in shown_points])
    heights = [_heights(column) for column in columns]
    figure = Figure(figsize=(1.9 * len(names) + 1.6, 4.2), layout="constrained")
    axes = figure.subplots()
    colours = ScalarMappable(Normalize(min(columns[-1]), max(columns[-1])), colormaps["viridis"])
    for i, result in enumerate(shown_points):
        axes.plot(
            range(len(names)),
            [column[i] for column in heights],
            color=colours.to_rgba(columns[-1][i]),
            linestyle="-" if result.status == "finished" else ":",
        )
    for place, (column, height) in enumerate(zip(columns, heights, strict=True)):
        axes.axvline(place, color="0.6", linewidth=0.8)
        for value, y in {shown(v): y for v, y in zip(column, height, strict=True)}.items():
            axes.annotate(value, (place, y), fontsize="x-small", xytext=(3, 2), textcoords="offset points")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks([])
    axes.margins(x=0.12)
    figure.colorbar(colours, ax=axes, label=space.metric)
    figure.savefig(out, dpi=120)
    return out


def _heights(values: Sequence[Any]) -> list[float]:
    """Where values stand on an axis from 0 to 1; what is no number stands in the order of its first appearance."""
    if all(_is_number(value) for value in values):
        wide = min(values) > 0 and max(values) / min(values) >= _LOG_FROM
        places = [math.log(value) if wide else float(value) for value in values]
    else:
        order = list(dict.fromkeys(shown(value) for value in values))
        places = [float(order.index(shown(value))) for value in values]
    low, span = min(places), max(places) - min(places)
    return [(place - low) / span if span else 0.5 for place in places]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
