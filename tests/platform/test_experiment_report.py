"""The final table: ours with its interval, published figures with their setting, missing ones told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eagleray.platform.experiment import Stage
from eagleray.platform.experiment_report import Published, Wanted, read_figures, to_markdown, write_experiment
from eagleray.platform.experiment_run import Outcome

ABOUT = {"name": "toy", "title": "A toy", "size": "ten weights.", "data": "made up."}


def _stage(folder: Path) -> Stage:
    (folder / "run").mkdir()
    report = {
        "sets": {"a.b": {"accuracy": {"value": 0.5, "low": 0.25, "high": 0.75}}},
        "phases": [{"loss": 2.0}],
    }
    (folder / "run" / "report.json").write_text(json.dumps(report))
    return Stage("evaluate", "toy.evaluate", {}, (), (), "abc", folder / "run")


def _wanted(metric: str, published: Published | None = None) -> Wanted:
    return Wanted("ours", ["evaluate"], metric, "%", 100, published)


def test_figures_come_scaled_with_their_interval(tmp_path: Path) -> None:
    stage = _stage(tmp_path)
    wanted = [_wanted("sets.a.b.accuracy"), _wanted("phases.0.loss")]
    estimate, plain = read_figures(wanted, {"evaluate": stage})
    assert (estimate.value, estimate.low, estimate.high) == (50, 25, 75)
    assert (plain.value, plain.low, plain.high) == (200, None, None)


def test_a_mean_has_an_interval_of_its_own_or_no_value(tmp_path: Path) -> None:
    """1 and 3: mean 2, and t(0.975; 1) = 12.706 times the standard error 1; without one of them there is no mean."""
    stages = {}
    for name, report in {"a": {"loss": 1.0}, "b": {"loss": {"value": 3.0, "low": 2.9, "high": 3.1}}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report))
        stages[name] = Stage(name, "toy", {}, (), (), name, tmp_path / name)
    wanted = Wanted("mean", ["a", "b"], "loss", "%", 10, None)
    [figure] = read_figures([wanted], stages)
    found = (figure.value, figure.low, figure.high)
    assert found == pytest.approx((20, 20 - 127.062, 20 + 127.062), abs=1e-3) and figure.stage == "a, b"
    (tmp_path / "b" / "report.json").unlink()
    [figure] = read_figures([wanted], stages)
    assert (figure.value, figure.low, figure.high) == (None, None, None)


def test_a_figure_that_is_not_there_is_told_with_its_neighbours(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    [figure] = read_figures([_wanted("phases.0.los")], {"evaluate": _stage(tmp_path)})
    assert figure.value is None and "near are: phases.0.loss" in caplog.text
    assert "not measured" in to_markdown(ABOUT, [figure])


def test_a_published_figure_stands_with_what_it_is_of(tmp_path: Path) -> None:
    published = Published(85.1, "RewardBench, 8 billion weights")
    figures = read_figures([_wanted("sets.a.b.accuracy", published)], {"evaluate": _stage(tmp_path)})
    table = to_markdown(ABOUT, figures)
    assert "| ours (%) | 50 | 25 to 75 | 85.1 | RewardBench, 8 billion weights |" in table
    assert "Ours: ten weights. Data: made up." in table and "no target of ours" in table
    assert "no target" not in to_markdown(
        ABOUT, read_figures([_wanted("phases.0.loss")], {"evaluate": _stage_again(tmp_path)})
    )


def _stage_again(folder: Path) -> Stage:
    return Stage("evaluate", "toy.evaluate", {}, (), (), "abc", folder / "run")


def test_the_report_is_written_once(tmp_path: Path) -> None:
    """A re-run without changes touches nothing; a changed outcome is written."""
    stage = _stage(tmp_path)
    figures = read_figures([_wanted("sets.a.b.accuracy", Published(85.1, "theirs"))], {"evaluate": stage})
    write_experiment(tmp_path, ABOUT, [stage], {"evaluate": Outcome("finished")}, figures)
    files = [tmp_path / "report.json", tmp_path / "report.md", tmp_path / "plots" / "results.png"]
    before = [file.stat().st_mtime_ns for file in files]
    write_experiment(tmp_path, ABOUT, [stage], {"evaluate": Outcome("done")}, figures)
    assert [file.stat().st_mtime_ns for file in files] == before
    write_experiment(tmp_path, ABOUT, [stage], {"evaluate": Outcome("failed", "no | luck")}, figures)
    assert "failed: no / luck" in (tmp_path / "report.md").read_text()
    assert json.loads(files[0].read_text())["stages"]["evaluate"]["error"] == "no | luck"
