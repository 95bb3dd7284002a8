"""Pictures of a sweep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread

from eagleray.platform.space import Space
from eagleray.platform.sweep_plots import _heights, plot_by_value, plot_over_time, plot_parallel
from eagleray.platform.sweep_results import PointResult, TrialRecord, TrialStatus

SPACE = Space("toy", {"optim.lr": {"grid_search": [1, 2, 3]}}, "accuracy", "max")


def result(value: object, accuracy: float | None, status: TrialStatus = "finished") -> PointResult:
    records = [] if accuracy is None else [{"step": 1, "accuracy": accuracy}, {"step": 2, "accuracy": None}]
    point = {"optim.lr": value}
    trial = TrialRecord("0001", "0001", point, 0, status, records, None, None)
    metrics = {} if accuracy is None else {"accuracy": accuracy, "ece": 0.1}
    return PointResult(point, [trial], metrics, interval=0.1)


RESULTS = [result(0.1, 0.5), result(0.2, 0.7), result(0.3, 0.4, "stopped"), result(0.4, None, "failed")]


def test_one_panel_a_metric_that_was_evaluated(tmp_path: Path) -> None:
    one = plot_by_value(RESULTS, SPACE, "optim.lr", ["accuracy"], tmp_path / "one.png")
    two = plot_by_value(RESULTS, SPACE, "optim.lr", ["accuracy", "ece", "unknown"], tmp_path / "two.png")
    assert one is not None and two is not None
    assert imread(two).shape[1] == 2 * imread(one).shape[1]


def test_nothing_to_draw(tmp_path: Path) -> None:
    out = tmp_path / "none.png"
    assert plot_by_value(RESULTS, SPACE, "optim.lr", ["unknown"], out) is None
    assert plot_by_value([result("cosine", 0.5)], SPACE, "optim.lr", ["accuracy"], out) is None
    assert not out.exists()


def test_every_trial_over_its_steps(tmp_path: Path) -> None:
    out = plot_over_time([result.trials[0] for result in RESULTS], SPACE, tmp_path / "time.png")
    assert imread(out).std() > 0.01


def test_an_axis_for_every_key_and_the_metric(tmp_path: Path) -> None:
    one = plot_parallel(RESULTS, SPACE, tmp_path / "one.png")
    varied = {"optim.lr": {"grid_search": [1]}, "optim.schedule": {"grid_search": ["a"]}}
    both = [replace(r, point={**r.point, "optim.schedule": "ab"[i % 2]}) for i, r in enumerate(RESULTS)]
    two = plot_parallel(both, Space("toy", varied, "accuracy", "max"), tmp_path / "two.png")
    assert one is not None and two is not None
    assert imread(two).shape[1] > imread(one).shape[1]
    assert plot_parallel(RESULTS[3:], SPACE, tmp_path / "none.png") is None


@pytest.mark.parametrize(
    ("values", "heights"),
    [
        ([1.0, 2.0, 3.0], [0.0, 0.5, 1.0]),
        ([1e-4, 1e-2, 1e-3], [0.0, 1.0, 0.5]),  # a wide range is logarithmic
        (["b", "a", "b"], [0.0, 1.0, 0.0]),
        ([True, True], [0.5, 0.5]),
    ],
)
def test_where_values_stand_on_an_axis(values: list[object], heights: list[float]) -> None:
    assert _heights(values) == pytest.approx(heights)
