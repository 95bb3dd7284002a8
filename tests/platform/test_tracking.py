"""The metrics sink: what is on disk after a step, a restart and a crash, and what trackers are told."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eagleray.platform.config import ConfigError
from eagleray.platform.sections import TrackingSection
from eagleray.platform.tracking import MetricsSink, read_metrics

FILE_ONLY = TrackingSection(tensorboard=False)


def steps(run_dir: Path) -> list[tuple[int, str]]:
    return [(record["step"], record["kind"]) for record in read_metrics(run_dir / "metrics.jsonl")]


def log_steps(run_dir: Path, first: int, last: int, *, resume_step: int = 0) -> None:
    with MetricsSink(run_dir, FILE_ONLY, resume_step) as sink:
        for step in range(first, last + 1):
            sink.log(step, {"loss": 1 / step})
            if step % 2 == 0:
                sink.log(step, {"accuracy": step / 10}, kind="eval")


def test_a_line_is_one_object_and_is_there_at_once(tmp_path: Path) -> None:
    sink = MetricsSink(tmp_path, FILE_ONLY)
    sink.log(40, {"loss": torch.tensor(0.5), "lr": 1e-5})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record.pop("time") > 1e9
    assert record == {"step": 40, "kind": "train", "loss": 0.5, "lr": 1e-5}
    sink.close()


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with MetricsSink(tmp_path, FILE_ONLY) as sink:
        sink.log(1, {"loss": math.nan, "grad_norm": math.inf})
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["loss"] is None
    assert record["grad_norm"] is None
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("key", ["step", "kind", "time"])
def test_reserved_names(tmp_path: Path, key: str) -> None:
    with MetricsSink(tmp_path, FILE_ONLY) as sink, pytest.raises(ValueError, match=f"given: {key}"):
        sink.log(1, {key: 1.0})


def test_resume_cuts_what_is_done_again(tmp_path: Path) -> None:
    log_steps(tmp_path, 1, 5)
    log_steps(tmp_path, 3, 6, resume_step=2)
    trains = [(step, "train") for step in range(1, 7)]
    evals = [(step, "eval") for step in (2, 4, 6)]
    assert sorted(steps(tmp_path)) == sorted(trains + evals)


def test_a_start_from_nothing_keeps_nothing(tmp_path: Path) -> None:
    with MetricsSink(tmp_path, FILE_ONLY) as sink:
        sink.log(0, {"accuracy": 0.5}, kind="eval")
        sink.log(1, {"loss": 1.0})
    log_steps(tmp_path, 1, 1)
    assert steps(tmp_path) == [(1, "train")]


@pytest.mark.parametrize(
    "tail", [b'{"step": 3, "kind": "tr', b'{"step": 3}\n', b"\xff\xfe\n", b"[1, 2]\n", b"\n"]
)
def test_a_broken_last_line_is_left_out_and_repaired(tmp_path: Path, tail: bytes) -> None:
    log_steps(tmp_path, 1, 1)
    path = tmp_path / "metrics.jsonl"
    with path.open("ab") as file:
        file.write(tail)
    assert steps(tmp_path) == [(1, "train")]
    with MetricsSink(tmp_path, FILE_ONLY, resume_step=1) as sink:
        sink.log(2, {"loss": 0.5})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_whole_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kind": "train", "time": 1, "loss": 2.0}')
    with MetricsSink(tmp_path, FILE_ONLY, resume_step=1) as sink:
        sink.log(2, {"loss": 0.5})
    assert steps(tmp_path) == [(1, "train"), (2, "train")]


def test_no_file_has_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    for first, last, resume_step in ((1, 4, 0), (3, 5, 2)):
        with MetricsSink(tmp_path, TrackingSection(), resume_step) as sink:
            for step in range(first, last + 1):
                sink.log(step, {"loss": 10 * resume_step + step})
            sink.log(last, {"accuracy": 0.5}, kind="eval")
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(1, 1), (2, 2), (3, 23), (4, 24), (5, 25)]
    assert [event.step for event in events.Scalars("eval/accuracy")] == [5]


@pytest.mark.parametrize(("key", "value"), [("mlflow", "file:mlruns"), ("wandb", "project")])
def test_a_missing_package_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str
) -> None:
    monkeypatch.setitem(sys.modules, key, None)
    expected = rf"`tracking\.{key}` is set, but {key} is not installed.*pip install 'eagleray\[{key}\]'"
    with pytest.raises(ConfigError, match=expected):
        MetricsSink(tmp_path, TrackingSection(tensorboard=False, **{key: value}))


class FakeMLflowClient:
    """The part of `mlflow.MlflowClient` in use; the calls of all instances go to one list."""

    calls: list[tuple[Any, ...]]

    def __init__(self, tracking_uri: str) -> None:
        self.calls.append(("connect", tracking_uri))

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        self.calls.append(("experiment", name))
        return "7"

    def create_run(self, experiment_id: str, run_name: str) -> SimpleNamespace:
        self.calls.append(("create", experiment_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="abc"))

    def update_run(self, run_id: str, status: str) -> None:
        self.calls.append(("update", run_id, status))

    def log_param(self, run_id: str, key: str, value: str) -> None:
        self.calls.append(("param", run_id, key, value))

    def log_metric(self, run_id: str, key: str, value: float, step: int) -> None:
        self.calls.append(("metric", run_id, key, value, step))

    def set_terminated(self, run_id: str, status: str) -> None:
        self.calls.append(("end", run_id, status))


@pytest.fixture
def mlflow_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    module = ModuleType("mlflow")
    calls: list[tuple[Any, ...]] = []
    client = type("Client", (FakeMLflowClient,), {"calls": calls})
    monkeypatch.setattr(module, "MlflowClient", client, raising=False)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return calls


def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, mlflow_calls: list[tuple[Any, ...]]) -> None:
    (tmp_path / "config.yaml").write_text("job: toy.train\noptim: {lr: 0.1}\n")
    tracking = TrackingSection(tensorboard=False, mlflow="http://server")
    with MetricsSink(tmp_path, tracking) as sink:
        sink.log(1, {"loss": 2.0, "grad_norm": math.nan})
    assert mlflow_calls == [
        ("connect", "http://server"),
        ("experiment", "toy.train"),
        ("create", "7", tmp_path.name),
        ("param", "abc", "job", "toy.train"),
        ("param", "abc", "optim.lr", "0.1"),
        ("metric", "abc", "train/loss", 2.0, 1),
        ("end", "abc", "FINISHED"),
    ]
    mlflow_calls.clear()
    with pytest.raises(RuntimeError, match="boom"), MetricsSink(tmp_path, tracking, 1):
        raise RuntimeError("boom")
    assert mlflow_calls == [
        ("connect", "http://server"),
        ("update", "abc", "RUNNING"),
        ("end", "abc", "FAILED"),
    ]


@pytest.mark.usefixtures("mlflow_calls")
def test_a_server_that_cannot_be_reached_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise ConnectionError("connection refused.")

    monkeypatch.setattr(FakeMLflowClient, "get_experiment_by_name", refused)
    expected = r"`tracking\.mlflow` is 'http://nowhere', which does not work: connection refused\. Correct it"
    with pytest.raises(ConfigError, match=expected):
        MetricsSink(tmp_path, TrackingSection(tensorboard=False, mlflow="http://nowhere"))


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inits: list[dict[str, Any]] = []
    logged: list[dict[str, float]] = []

    def init(**arguments: Any) -> SimpleNamespace:
        inits.append(arguments)
        return SimpleNamespace(
            define_metric=lambda *_, **__: None,
            log=logged.append,
            finish=lambda exit_code: logged.append({"exit": exit_code}),
        )

    module = ModuleType("wandb")
    monkeypatch.setattr(module, "init", init, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", module)
    for resume_step in (0, 1):
        with MetricsSink(tmp_path, TrackingSection(tensorboard=False, wandb="mine"), resume_step) as sink:
            sink.log(resume_step + 1, {"loss": 2.0})
    assert inits[0]["id"] == inits[1]["id"]
    assert (inits[0]["project"], inits[0]["resume"], inits[0]["name"]) == ("mine", "allow", tmp_path.name)
    assert logged == [
        {"step": 1, "train/loss": 2.0},
        {"exit": 0},
        {"step": 2, "train/loss": 2.0},
        {"exit": 0},
    ]


def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(
    tmp_path: Path,
    mlflow_calls: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("server is gone")

    with MetricsSink(tmp_path, TrackingSection(tensorboard=False, mlflow="http://server")) as sink:
        monkeypatch.setattr(FakeMLflowClient, "log_metric", unreachable)
        with caplog.at_level(logging.WARNING):
            sink.log(1, {"loss": 1.0})
            sink.log(2, {"loss": 1.0})
    assert [record.getMessage() for record in caplog.records] == ["_MLflow gets no more metrics of this run."]
    assert steps(tmp_path) == [(1, "train"), (2, "train")]
