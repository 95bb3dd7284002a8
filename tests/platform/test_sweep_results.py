"""What a sweep reports: which evaluation counts, who is best, how a stopped trial is recorded, the tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import JobConfig, RunSection
from eagleray.platform.space import SEED_KEY, Space, TrialOutcome
from eagleray.platform.sweep_results import (
    SweepError,
    TrialRecord,
    interval_95,
    join_segments,
    kept_evaluation,
    rank_points,
    read_trial,
    table_rows,
    to_csv,
    to_markdown,
)

SPACE = Space(
    "toy", {"loss.smoothing": {"grid_search": [0.0, 0.1]}, "loss.kind": "two_way"}, "accuracy", "max"
)


def evaluation(step: int, accuracy: float | None, nll: float = 0.5) -> dict[str, Any]:
    return {"step": step, "kind": "eval", "time": 1.0, "accuracy": accuracy, "nll": nll}


def trial(
    name: str,
    smoothing: float,
    *accuracies: float,
    seed: int = 0,
    status: Literal["finished", "stopped", "failed"] = "finished",
    error: str | None = None,
) -> TrialRecord:
    records = [evaluation(10 * (i + 1), accuracy) for i, accuracy in enumerate(accuracies)]
    kept = kept_evaluation(records, "accuracy", "max", keep="best")
    point = {"loss.smoothing": smoothing, "loss.kind": "two_way"}
    return TrialRecord(name, f"trials/{name}", point, seed, status, records, kept, error)


@pytest.mark.parametrize(
    ("mode", "keep", "step"), [("max", "best", 20), ("min", "best", 10), ("max", "last", 30)]
)
def test_the_kept_evaluation(mode: Any, keep: Any, step: int) -> None:
    records = [evaluation(10, 0.5), evaluation(20, 0.9), evaluation(30, 0.9), evaluation(40, None)]
    kept = kept_evaluation(records, "accuracy", mode, keep=keep)
    assert kept is not None and kept["step"] == step


def test_a_metric_that_was_never_finite_keeps_nothing() -> None:
    assert kept_evaluation([evaluation(10, None)], "accuracy", "max", keep="best") is None
    assert kept_evaluation([evaluation(10, 0.5)], "f1", "max", keep="best") is None


def make_run(path: Path, *, ends: Literal["well", "badly", "killed"]) -> TrialOutcome:
    """A run folder as a trial leaves it."""
    run = RunFolder.create("toy", JobConfig(run=RunSection(dir=str(path))))
    try:
        with run.recording():
            run.metrics.write_text(json.dumps(evaluation(10, 0.75)) + "\n")
            if ends == "badly":
                raise ValueError("bad data")
    except ValueError:
        pass
    if ends == "killed":
        attempts = run.read_manifest()["attempts"]
        run.update_manifest(status="running", attempts=[{**attempts[0], "status": "running"}])
    return TrialOutcome("0001", str(path), {"loss.smoothing": 0.1, "loss.kind": "two_way", SEED_KEY: 3}, None)


def test_a_finished_trial(tmp_path: Path) -> None:
    read = read_trial(make_run(tmp_path / "0001", ends="well"), SPACE, keep="best")
    assert (read.status, read.seed, read.error) == ("finished", 3, None)
    assert read.point == {"loss.smoothing": 0.1, "loss.kind": "two_way"}
    assert read.kept is not None and read.kept["accuracy"] == 0.75


@pytest.mark.parametrize("ends", ["killed", "badly"])
def test_a_trial_that_the_scheduler_stopped_is_recorded_so(
    tmp_path: Path, ends: Literal["killed", "badly"]
) -> None:
    """When its process is ended, the run may still write that its connection broke."""
    path = tmp_path / "0001"
    read = read_trial(make_run(path, ends=ends), SPACE, keep="best")
    assert (read.status, read.error) == ("stopped", None)
    manifest = RunFolder(path).read_manifest()
    attempt = manifest["attempts"][-1]
    assert (manifest["status"], attempt["status"]) == ("stopped", "stopped")
    assert manifest["ended"] == attempt["ended"] is not None
    assert "error" not in attempt and "traceback" not in attempt


def test_a_failed_trial_tells_the_reason_in_its_manifest(tmp_path: Path) -> None:
    outcome = make_run(tmp_path / "0001", ends="badly")
    failed = TrialOutcome(outcome.name, outcome.place, outcome.point, "TaskError: a wrapper")
    read = read_trial(failed, SPACE, keep="best")
    assert (read.status, read.error) == ("failed", "ValueError: bad data")


def test_a_trial_that_never_began_tells_what_tune_saw(tmp_path: Path) -> None:
    outcome = TrialOutcome(
        "0001", str(tmp_path / "0001"), {"loss.smoothing": 0.1, SEED_KEY: 0}, "worker died"
    )
    read = read_trial(outcome, SPACE, keep="best")
    assert (read.status, read.error, read.kept) == ("failed", "worker died", None)


def test_best_first_and_unfinished_last() -> None:
    """The stopped trial's 0.95 does not beat a whole run."""
    trials = [
        trial("0001", 0.0, 0.7),
        trial("0002", 0.1, 0.95, status="stopped"),
        trial("0003", 0.2, status="failed"),
        trial("0004", 0.3, 0.8),
        trial("0005", 0.4, 0.97, status="stopped"),
    ]
    ranked = rank_points(trials, SPACE)
    assert [result.trials[0].name for result in ranked] == ["0004", "0001", "0005", "0002", "0003"]


def test_least_first_when_less_is_better() -> None:
    space = Space("toy", SPACE.domains, "accuracy", "min")
    ranked = rank_points([trial("0001", 0.0, 0.7), trial("0002", 0.1, 0.6)], space)
    assert [result.trials[0].name for result in ranked] == ["0002", "0001"]


def test_mean_and_interval_over_seeds() -> None:
    """Values 1 and 3: mean 2, standard error 1, and the t quantile for one degree of freedom is 12.7062."""
    trials = [trial("0001", 0.1, 1.0), trial("0002", 0.1, 3.0, seed=1), trial("0003", 0.2, 1.5)]
    best, second = rank_points(trials, SPACE)
    assert best.point["loss.smoothing"] == 0.1
    assert best.metrics == {"accuracy": 2.0, "nll": 0.5}
    assert best.interval == pytest.approx(12.7062, abs=1e-4)
    assert second.interval is None


def test_a_point_with_a_failed_seed_is_not_a_whole_one() -> None:
    trials = [
        trial("0001", 0.1, 0.9),
        trial("0002", 0.1, seed=1, status="failed"),
        trial("0003", 0.2, 0.6),
    ]
    ranked = rank_points(trials, SPACE)
    assert [result.status for result in ranked] == ["finished", "failed"]
    assert ranked[1].metrics == {}


def test_a_point_drawn_twice_is_no_repetition() -> None:
    """The same point with the same seed is the same run: its spread says nothing."""
    ranked = rank_points(
        [trial("0001", 0.1, 0.9), trial("0002", 0.1, 0.9), trial("0003", 0.1, 0.8, seed=1)], SPACE
    )
    assert [[t.name for t in result.trials] for result in ranked] == [["0002"], ["0001", "0003"]]


@pytest.mark.parametrize(("keep", "smoothing", "accuracy"), [("best", 0.2, 0.9), ("last", 0.3, 0.8)])
def test_segments_are_one_trial_with_the_values_of_the_kept_model(
    keep: Any, smoothing: float, accuracy: float
) -> None:
    parts = [trial("0001", 0.1, 0.7), trial("0001", 0.2, 0.9), trial("0001", 0.3, 0.8), trial("0001", 0.4)]
    joined = join_segments([*parts[:3], replace(parts[3], status="failed", error="why")], SPACE, keep=keep)
    assert joined.kept is not None
    assert (joined.point["loss.smoothing"], joined.kept["accuracy"]) == (smoothing, accuracy)
    assert [record["accuracy"] for record in joined.evaluations] == [0.7, 0.9, 0.8]
    assert (joined.status, joined.error) == ("failed", "why")


def test_interval_of_equal_values_is_zero() -> None:
    assert interval_95([2.0, 2.0, 2.0]) == 0.0
    assert interval_95([2.0]) is None


def test_a_sweep_of_failures_names_the_first() -> None:
    trials = [
        trial("0001", 0.0, status="failed", error="ValueError: bad data"),
        trial("0002", 0.1, status="failed"),
    ]
    with pytest.raises(SweepError, match=r"2 of 2 trials failed.*trials/0001: ValueError: bad data"):
        rank_points(trials, SPACE)


def test_a_metric_that_nobody_evaluates() -> None:
    space = Space("toy", SPACE.domains, "f1", "max")
    record = trial("0001", 0.0, 0.5)
    without = TrialRecord(
        *[getattr(record, name) for name in ("name", "place", "point", "seed", "status")],
        evaluations=record.evaluations,
        kept=None,
        error=None,
    )
    with pytest.raises(SweepError, match=r"selects by `f1`.*the trials evaluated: accuracy, nll"):
        rank_points([without], space)


def test_tables() -> None:
    trials = [trial("0001", 0.0, 0.5, 0.75), trial("0002", 0.1, status="failed")]
    rows = table_rows(rank_points(trials, SPACE), SPACE)
    assert to_csv(rows) == (
        "loss.smoothing,accuracy,nll,status,step,trials\n0.0,0.75,0.5,finished,20,0001\n0.1,,,failed,0,0002\n"
    )
    assert to_markdown(rows) == (
        "| loss.smoothing | accuracy | nll | status   | step | trials |\n"
        "|----------------|----------|-----|----------|------|--------|\n"
        "| 0              | 0.75     | 0.5 | finished | 20   | 0001   |\n"
        "| 0.1            | -        | -   | failed   | 0    | 0002   |\n"
    )


def test_the_table_shows_intervals_where_there_are_seeds() -> None:
    trials = [trial("0001", 0.1, 0.5), trial("0002", 0.1, 0.5, seed=1)]
    (row,) = table_rows(rank_points(trials, SPACE), SPACE)
    assert (row["accuracy"], row["accuracy_ci95"], row["trials"]) == (0.5, 0.0, "0001 0002")
