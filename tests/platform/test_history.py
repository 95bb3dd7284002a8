"""Listing, loading and comparing run folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from eagleray.platform.config import ConfigError, load_config
from eagleray.platform.history import compare_runs, list_runs, load_run, short_names
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import TrackingSection, TrainingConfig
from eagleray.platform.storage import DamagedFileError
from eagleray.platform.tracking import MetricsSink


def make_run(folder: Path, *overrides: str, report: dict[str, object] | None = None) -> Path:
    run = RunFolder.create("toy.train", load_config(TrainingConfig, None, [f"run.dir={folder}", *overrides]))
    with run.recording():
        if report is not None:
            run.write_report(report)
    return run.path


def log_evals(folder: Path) -> None:
    with MetricsSink(folder, TrackingSection(tensorboard=False)) as sink:
        sink.log(1, {"loss": 2.0})
        sink.log(1, {"accuracy": 0.5, "ece": 0.2}, kind="eval")
        sink.log(2, {"accuracy": 0.75}, kind="eval")


def test_runs_are_found_at_any_depth_but_not_inside_runs(tmp_path: Path) -> None:
    first = make_run(tmp_path / "demo/finetune")
    second = make_run(tmp_path / "b")
    for inner in ("checkpoints", "model", "data"):
        (first / inner).mkdir()
        (first / inner / "manifest.json").write_text("{}")
    assert {run.path for run in list_runs(tmp_path)} == {first, second}
    assert list_runs(tmp_path / "missing") == []


def test_runs_are_sorted_by_time(tmp_path: Path) -> None:
    for name, created in (("a", "2026-02-01T00:00:00+00:00"), ("b", "2026-01-01T00:00:00+00:00")):
        RunFolder(make_run(tmp_path / name)).update_manifest(created=created)
    assert [run.path.name for run in list_runs(tmp_path)] == ["b", "a"]


def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path) -> None:
    make_run(tmp_path / "good")
    (make_run(tmp_path / "bad") / "manifest.json").write_text("{")
    assert {run.path.name: run.status for run in list_runs(tmp_path)} == {
        "good": "finished",
        "bad": "unreadable",
    }
    with pytest.raises(DamagedFileError, match=r"bad/manifest\.json is damaged"):
        load_run(tmp_path / "bad")


def test_a_run_without_a_living_driver_was_killed(tmp_path: Path) -> None:
    run = RunFolder.create("toy.train", load_config(TrainingConfig, None, [f"run.dir={tmp_path / 'run'}"]))
    with run.recording():
        assert load_run(run.path).status == "running"
        run.close()  # what the kernel does for a dead process
        assert load_run(run.path).status == "killed"


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run folder: it holds no manifest\.json"):
        load_run(tmp_path)


def test_final_metrics_come_from_the_report(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", report={"test": {"accuracy": 0.9}, "steps": 3})
    log_evals(path)
    assert load_run(path).final_metrics() == {"test.accuracy": 0.9, "steps": 3}


def test_final_metrics_without_a_report_are_the_last_evaluation(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    log_evals(path)
    assert load_run(path).final_metrics() == {"accuracy": 0.75, "ece": 0.2}


def test_comparison_shows_what_differs(tmp_path: Path) -> None:
    one = make_run(tmp_path / "x/one", "optim.lr=0.1", "lora={rank: 4}", report={"accuracy": 0.6, "ece": 0.1})
    two = make_run(tmp_path / "x/two", "optim.lr=0.2", report={"accuracy": 0.7})
    comparison = compare_runs([one, two])
    assert comparison.names == ["one", "two"]
    assert comparison.config["optim.lr"] == [0.1, 0.2]
    assert comparison.config["lora.rank"] == [4, None]
    assert not any(key.startswith(("run.", "train.")) for key in comparison.config)
    assert comparison.metrics == {"accuracy": [0.6, 0.7], "ece": [0.1, None]}


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/r/a", "/r/b"], ["a", "b"]),
        (["/r/a/x", "/r/b/x"], ["a/x", "b/x"]),
        (["/r/a/x", "/r/a/x"], ["x", "x"]),
        ([], []),
    ],
)
def test_short_names(paths: list[str], names: list[str]) -> None:
    assert short_names([Path(path) for path in paths]) == names
