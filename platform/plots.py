"""Pictures of runs: curves of one run, and runs laid over each other.

Figures are made through matplotlib's object interface; `pyplot` keeps global state and may want a display.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eagleray.platform.config import ConfigError
from eagleray.platform.history import short_names
from eagleray.platform.tracking import METRICS_FILE, RECORD_KEYS, read_metrics

_TRAIN_CURVES = {
    "lr": "Learning rate",
    "grad_norm": "Gradient norm before clipping (L2)",
    "tokens_per_s": "Throughput (tokens/s)",
}
"""Train metrics that get a picture of their own, besides the loss: key -> label of the axis."""

_SMOOTH_FROM = 20
"""Curves of fewer points are shown as they are."""


@dataclass(frozen=True)
class Curve:
    """One metric over the steps of a run; a value that was not finite is NaN."""

    steps: list[int]
    values: list[float]


def plot_training(run_dir: str | Path) -> list[Path]:
    """Draw the loss, each evaluation metric, the learning rate, the gradient norm and the throughput of a run.

    Args:
        run_dir: A run folder with a `metrics.jsonl`.

    Returns:
        The files written, in `plots/` of the run folder; metrics that were not logged have none.

    Raises:
        ConfigError: The run has logged nothing yet.
    """
    run_dir = Path(run_dir)
    train, evaluation = _read_curves(run_dir)
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    title = run_dir.absolute().name
    written: list[Path] = []
    if "loss" in train or "loss" in evaluation:
        figure, axes = _single(title, "Loss")
        if "loss" in train:
            _draw(axes, train["loss"], "train", smooth=True)
        if "loss" in evaluation:
            _draw(axes, evaluation["loss"], "evaluation")
        axes.legend()
        written.append(_save(figure, folder / "loss.png"))
    for key, label in _TRAIN_CURVES.items():
        if key in train:
            figure, axes = _single(title, label)
            _draw(axes, train[key], key)
            written.append(_save(figure, folder / f"{key}.png"))
    for key, curve in evaluation.items():
        if key != "loss":
            figure, axes = _single(title, f"Evaluation: {key}")
            _draw(axes, curve, key)
            written.append(_save(figure, folder / f"eval_{_file_name(key)}.png"))
    return written


def plot_comparison(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Lay runs over each other: one panel for the train loss and one for each evaluation metric.

    Args:
        run_dirs: Run folders; a panel holds those that have its metric.
        out: The picture to write.

    Returns:
        `out` as a path.

    Raises:
        ConfigError: One of the runs has logged nothing yet, or none of them anything to compare.
    """
    folders = [Path(run_dir) for run_dir in run_dirs]
    runs = [_read_curves(folder) for folder in folders]
    panels = [("Train loss", "loss", 0)] if any("loss" in train for train, _ in runs) else []
    keys = {key: None for _, evaluation in runs for key in evaluation}
    panels += [(f"Evaluation: {key}", key, 1) for key in keys]
    if not panels:
        raise ConfigError(
            "These runs have logged neither a loss nor an evaluation; there is nothing to compare."
        )
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6.4 * columns, 4 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    names = short_names(folders)
    figure.suptitle(" and ".join(names) if len(names) == 2 else f"{len(names)} runs")
    for axes, (label, key, kind) in zip(grid, panels, strict=False):
        for index, (name, curves) in enumerate(zip(names, runs, strict=True)):
            if key in curves[kind]:
                _draw(axes, curves[kind][key], name, color=f"C{index}", smooth=kind == 0)
        _label(axes, label)
        axes.legend(fontsize="small")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    return _save(figure, out)


def smoothed(values: Sequence[float], *, span: float) -> list[float]:
    """Exponential moving average with weight `2 / (span + 1)`, without the bias of a start at zero.

    NaNs stay NaN and do not spread: a single bad step must be seen, and must not hide those after it.

    >>> smoothed([1.0, 4.0], span=1)
    [1.0, 4.0]
    >>> smoothed([3.0, 3.0, 3.0], span=9)
    [3.0, 3.0, 3.0]
    """
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    result = []
    for value in values:
        if math.isnan(value):
            result.append(math.nan)
            continue
        total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight)
    return result


def _read_curves(run_dir: Path) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """Train and evaluation curves by metric."""
    path = run_dir / METRICS_FILE
    records = read_metrics(path)
    if not records:
        raise ConfigError(f"{path} holds no metrics yet; there is nothing to plot.")
    return _curves(records, "train"), _curves(records, "eval")


def _curves(records: list[dict[str, Any]], kind: str) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for record in records:
        if record["kind"] != kind:
            continue
        for key, value in record.items():
            if key not in RECORD_KEYS:
                curve = curves.setdefault(key, Curve([], []))
                curve.steps.append(record["step"])
                curve.values.append(math.nan if value is None else value)
    return curves


def _single(title: str, label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4))
    # Not a layout that fits itself: it draws everything twice, half of the time of a plot, at the end of every run.
    axes = figure.add_axes((0.15, 0.13, 0.82, 0.79))
    axes.set_title(title, fontsize="medium")
    _label(axes, label)
    return figure, axes


def _label(axes: Axes, label: str) -> None:
    axes.set_xlabel("Optimiser step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)


def _draw(axes: Axes, curve: Curve, name: str, *, color: str | None = None, smooth: bool = False) -> None:
    count = len(curve.values)
    if smooth and count >= _SMOOTH_FROM:
        (line,) = axes.plot(
            curve.steps, smoothed(curve.values, span=count / 20), label=f"{name} (smoothed)", color=color
        )
        axes.plot(curve.steps, curve.values, alpha=0.25, linewidth=0.8, color=line.get_color())
    else:
        axes.plot(
            curve.steps,
            curve.values,
            label=name,
            color=color,
            marker="o" if count <= 30 else "",
            markersize=3,
        )


def _file_name(metric: str) -> str:
    return "".join(char if char.isalnum() or char in "._-" else "_" for char in metric)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path
