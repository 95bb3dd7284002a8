"""Pictures of a sweep: metrics against each varied key, and the selecting metric over the steps of every trial."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from eagleray.platform.sweep_results import PointResult, TrialRecord
from eagleray.platform.tuning import Space, shown

_LEGEND_UP_TO = 20
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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
