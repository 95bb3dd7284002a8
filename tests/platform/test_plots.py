"""Plots: which pictures are written, and what is in them (read from the figure that is saved)."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from eagleray.platform.config import ConfigError
from eagleray.platform.plots import plot_comparison, plot_training, smoothed
from eagleray.platform.sections import TrackingSection
from eagleray.platform.tracking import MetricsSink

PNG = b"\x89PNG\r\n"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Saved figures by file name."""
    saved: dict[str, Figure] = {}
    save = Figure.savefig

    def keep(self: Figure, path: Path, **options: object) -> None:
        saved[path.name] = self
        save(self, path, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def log_run(folder: Path, evaluation: Mapping[str, float] | None = None, *, steps: int = 3) -> Path:
    folder.mkdir(parents=True)
    with MetricsSink(folder, TrackingSection(tensorboard=False)) as sink:
        for step in range(1, steps + 1):
            sink.log(
                step, {"loss": 1 / step, "lr": 1e-5, "grad_norm": 2.0, "tokens_per_s": 100.0, "epoch": 0.1}
            )
        if evaluation:
            sink.log(steps, evaluation, kind="eval")
    return folder


def points(line: Line2D) -> tuple[list[float], list[float]]:
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def test_one_picture_a_metric(tmp_path: Path, figures: dict[str, Figure]) -> None:
    run = log_run(tmp_path / "run", {"loss": 0.4, "accuracy": 0.75, "accuracy/long answers": 0.5})
    written = plot_training(run)
    assert {path.name for path in written} == {
        "loss.png",
        "lr.png",
        "grad_norm.png",
        "tokens_per_s.png",
        "eval_accuracy.png",
        "eval_accuracy_long_answers.png",
    }
    assert all(path.parent == run / "plots" and path.read_bytes().startswith(PNG) for path in written)
    (axes,) = figures["tokens_per_s.png"].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Optimiser step", "Throughput (tokens/s)")
    assert axes.get_title() == "run"


def test_loss_shows_train_and_evaluation(tmp_path: Path, figures: dict[str, Figure]) -> None:
    plot_training(log_run(tmp_path / "run", {"loss": 0.4}))
    train, evaluation = figures["loss.png"].axes[0].get_lines()
    assert points(train)[0] == [1, 2, 3]
    assert points(train)[1] == pytest.approx([1, 1 / 2, 1 / 3])
    assert points(evaluation) == ([3], [0.4])


def test_long_curves_are_smoothed_over_the_raw_one(tmp_path: Path, figures: dict[str, Figure]) -> None:
    plot_training(log_run(tmp_path / "run", steps=40))
    smooth, raw = figures["loss.png"].axes[0].get_lines()
    assert smooth.get_label() == "train (smoothed)"
    assert points(raw)[1] == pytest.approx([1 / step for step in range(1, 41)])
    assert smooth.get_color() == raw.get_color()


def test_a_loss_that_was_not_finite_is_a_gap(tmp_path: Path, figures: dict[str, Figure]) -> None:
    with MetricsSink(tmp_path, TrackingSection(tensorboard=False)) as sink:
        for step, loss in ((1, 1.0), (2, math.nan), (3, 0.5)):
            sink.log(step, {"loss": loss})
    plot_training(tmp_path)
    assert points(figures["loss.png"].axes[0].get_lines()[0])[1] == pytest.approx(
        [1.0, math.nan, 0.5], nan_ok=True
    )


def test_comparison_has_a_panel_a_metric_and_a_line_a_run(tmp_path: Path, figures: dict[str, Figure]) -> None:
    runs = [
        log_run(tmp_path / "a", {"accuracy": 0.5}),
        log_run(tmp_path / "b", {"accuracy": 0.6, "ece": 0.1}),
    ]
    out = plot_comparison(runs, tmp_path / "new" / "both.png")
    assert out.read_bytes().startswith(PNG)
    assert figures["both.png"].get_suptitle() == "a and b"
    panels = [axes for axes in figures["both.png"].axes if axes.axison]
    labels = {axes.get_ylabel(): [line.get_label() for line in axes.get_lines()] for axes in panels}
    assert labels == {"Train loss": ["a", "b"], "Evaluation: accuracy": ["a", "b"], "Evaluation: ece": ["b"]}
    first, last = panels[0].get_lines()[1], panels[2].get_lines()[0]
    assert first.get_color() == last.get_color()  # a run has one colour in all panels


def test_nothing_to_plot(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics\.jsonl holds no metrics yet"):
        plot_training(tmp_path)
    with MetricsSink(tmp_path, TrackingSection(tensorboard=False)) as sink:
        sink.log(1, {"lr": 1.0})
    with pytest.raises(ConfigError, match="neither a loss nor an evaluation"):
        plot_comparison([tmp_path], tmp_path / "x.png")


def test_smoothing_by_hand() -> None:
    """Span 3 keeps 1/2: (1/2 * 1 + 3) / (1/2 + 1) = 7/3, then (1/2 * 7/2 + 5) / (1/2 * 3/2 + 1) = 27/7."""
    assert smoothed([1.0, 3.0, 5.0], span=3) == pytest.approx([1.0, 7 / 3, 27 / 7])
    assert smoothed([4.0] * 5, span=7) == pytest.approx([4.0] * 5)
    assert smoothed([1.0, math.nan, 3.0], span=3) == pytest.approx([1.0, math.nan, 7 / 3], nan_ok=True)


def test_pyplot_stays_out() -> None:
    code = "import sys, eagleray.platform.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
