"""Progress: numbers by hand from metric records, following a file that grows, is cut or is half written."""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from eagleray.platform.progress import MetricsFollower, TrainingState, format_seconds, training_progress
from eagleray.platform.sections import TrackingSection
from eagleray.platform.tracking import MetricsSink, cut_metrics


def record(step: int, seconds: float, kind: str = "train", **metrics: Any) -> dict[str, Any]:
    return {"step": step, "kind": kind, "time": seconds, **metrics}


def test_pace_and_time_left() -> None:
    state = TrainingState(total_steps=100)
    state.update(record(10, 100.0, loss=0.7), live=True)
    assert state.steps_per_second is None
    assert state.seconds_left is None
    state.update(record(20, 104.0, loss=0.5), live=True)
    assert state.steps_per_second == 2.5
    assert state.seconds_left == 32.0


def test_pace_is_that_of_the_last_records() -> None:
    state = TrainingState(total_steps=1000)
    for step in range(1, 101):
        state.update(record(step, step if step <= 50 else 50 + (step - 50) / 4), live=True)
    assert state.steps_per_second == pytest.approx(4.0)


def test_records_of_an_earlier_attempt_say_nothing_about_the_pace() -> None:
    state = TrainingState(total_steps=100)
    state.update(record(10, 100.0, loss=0.7), live=False)
    state.update(record(11, 9000.0, loss=0.7), live=True)
    assert state.steps_per_second is None
    state.update(record(12, 9002.0, loss=0.7), live=True)
    assert state.steps_per_second == 0.5


def test_a_restart_in_between_starts_the_pace_anew() -> None:
    state = TrainingState(total_steps=100)
    for step, seconds in ((10, 0.0), (20, 1.0), (11, 60.0), (12, 61.0)):
        state.update(record(step, seconds), live=True)
    assert state.step == 12
    assert state.steps_per_second == 1.0


def test_details() -> None:
    state = TrainingState(total_steps=100)
    assert state.details() == ""
    state.update(record(10, 0.0, loss=0.69314, tokens_per_s=12345.6), live=True)
    state.update(record(20, 4.0, loss=None, tokens_per_s=12345.6), live=True)
    state.update(record(20, 5.0, "eval", accuracy=0.7125, ece=None, brier=0.2, auc=0.8), live=True)
    assert state.details() == "2.5 steps/s, 12,346 tokens/s, eval accuracy 0.7125, eval brier 0.2, 32 s left"
    state.update(record(30, 8.0, loss=0.69314), live=True)
    assert state.details().startswith("loss 0.6931, 2.5 steps/s")


def test_nothing_is_left_at_the_end() -> None:
    state = TrainingState(total_steps=2)
    state.update(record(1, 0.0, loss=1.0), live=True)
    state.update(record(2, 1.0, loss=1.0), live=True)
    assert state.details() == "loss 1.0000, 1 steps/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
        (97200, "1 d 03 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_follower_sees_each_whole_line_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = MetricsFollower(path)
    assert follower.new_records() == []
    line = json.dumps(record(1, 0.0))
    path.write_text(line + "\n" + line[:10])
    assert [r["step"] for r in follower.new_records()] == [1]
    assert follower.new_records() == []
    with path.open("a") as file:
        file.write(line[10:] + "\n")
    assert [r["step"] for r in follower.new_records()] == [1]


@pytest.mark.parametrize("added", [0, 5], ids=["shorter than before", "longer again"])
def test_follower_starts_anew_when_the_file_was_cut(tmp_path: Path, added: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record(step, 0.0)) + "\n" for step in (1, 2, 3)))
    follower = MetricsFollower(path)
    assert [r["step"] for r in follower.new_records()] == [1, 2, 3]
    cut_metrics(path, 2)
    with path.open("a") as file:
        file.writelines(json.dumps(record(step, 0.0)) + "\n" for step in range(3, 3 + added))
    assert [r["step"] for r in follower.new_records()] == list(range(1, 3 + added))


def test_log_lines_without_a_terminal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    console = Console(file=io.StringIO())
    with (
        caplog.at_level(logging.INFO, logger="eagleray"),
        training_progress(tmp_path, 3, "toy", console=console, poll_s=0.01, line_every_s=60),
        MetricsSink(tmp_path, TrackingSection(tensorboard=False)) as sink,
    ):
        sink.log(1, {"loss": 0.5})
        wait_for(lambda: caplog.records)
        sink.log(2, {"loss": 0.25})
    lines = [r.getMessage() for r in caplog.records]
    assert lines[0] == "toy: step 1/3, loss 0.5000"
    assert lines[1].startswith("toy: step 2/3, loss 0.2500")
    assert len(lines) == 2
    assert console.file.getvalue() == ""  # pyright: ignore[reportAttributeAccessIssue]


def test_a_resumed_run_shows_its_own_pace(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    day_before = time.time() - 86_400
    path.write_text("".join(json.dumps(record(step, day_before + step)) + "\n" for step in range(1, 31)))
    with training_progress(tmp_path, 100, "toy", poll_s=0.01) as state:
        cut_metrics(path, 20)  # the checkpoint it goes on from
        now = time.time()
        with path.open("a") as file:
            file.writelines(json.dumps(record(step, now + (step - 20) / 4)) + "\n" for step in (21, 22, 23))
        wait_for(lambda: state.step == 23)
        assert state.steps_per_second == 4.0
        assert state.seconds_left == (100 - 23) / 4.0


def test_live_bar_on_a_terminal(tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with (
        training_progress(tmp_path, 3, "toy", console=console, poll_s=0.01) as state,
        MetricsSink(tmp_path, TrackingSection(tensorboard=False)) as sink,
    ):
        sink.log(2, {"loss": 0.25})
        wait_for(lambda: state.step == 2)
    last = screen.getvalue().splitlines()[-2]  # the last line only shows the cursor again
    assert "toy" in last
    assert "2/3" in last
    assert "loss 0.2500" in last


def test_the_thread_ends_with_the_block_even_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), training_progress(tmp_path, 3, "toy", poll_s=0.01):
        assert "training-progress" in {thread.name for thread in threading.enumerate()}
        raise RuntimeError("boom")
    assert "training-progress" not in {thread.name for thread in threading.enumerate()}


def wait_for(condition: Any, *, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
