"""A driver that is killed or interrupted: a resumable folder, and the same result in the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_task import assert_identical, toy_command, train_toy, train_undisturbed

from eagleray.platform.runs import RunInterrupted

pytestmark = pytest.mark.ray

RUN = ["train.max_steps=120", "train.eval_every=40", "dropout=0.2"]
PAUSE = "pause_s=0.02"


def _steps(run_dir: Path) -> list[int]:
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists():
        return []
    whole = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line)["step"] for line in whole]


def test_a_driver_is_killed_and_interrupted(tmp_path: Path, ray_cluster: None) -> None:
    """SIGKILL, then Ctrl-C, then the end: bit-identical to a run that nobody disturbed.

    Ctrl-C loses no step: the checkpoint is that of the last step that was logged. SIGTERM goes the same way
    (test_submit.py), and test_cli.py has the exit codes.
    """
    run_dir = tmp_path / "run"
    command, environment = toy_command(run_dir, *RUN, PAUSE)
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, env=environment, stderr=log, stdout=log)
    _wait_for_steps(run_dir, 10, lambda: driver.poll() is None)
    driver.kill()
    driver.wait()
    _wait_until_quiet(run_dir)
    assert _status(run_dir) == "running", "nobody was left to say otherwise"

    done = max(_steps(run_dir))
    threading.Thread(target=_interrupt_after, args=(run_dir, done + 10)).start()
    with pytest.raises(RunInterrupted) as stopped:
        train_toy(run_dir, *RUN, PAUSE)
    assert (stopped.value.signal, stopped.value.place) == (signal.SIGINT, str(run_dir))
    assert _status(run_dir) == "interrupted"
    newest = max(path.name for path in (run_dir / "checkpoints").iterdir())
    assert newest == f"step-{max(_steps(run_dir)):08d}"

    train_toy(run_dir, *RUN, PAUSE)
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert [attempt["status"] for attempt in manifest["attempts"]] == ["killed", "interrupted", "finished"]
    train_undisturbed(tmp_path / "whole", *RUN)
    assert_identical(run_dir, tmp_path / "whole")


def _wait_for_steps(run_dir: Path, step: int, alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while max(_steps(run_dir), default=0) < step:
        assert alive() and time.monotonic() < deadline
        time.sleep(0.02)


def _wait_until_quiet(run_dir: Path) -> None:
    """The worker of a driver that was killed dies a little later."""
    seen = -1
    while seen != len(_steps(run_dir)):
        seen = len(_steps(run_dir))
        time.sleep(2)


def _interrupt_after(run_dir: Path, step: int) -> None:
    _wait_for_steps(run_dir, step, lambda: True)
    os.kill(os.getpid(), signal.SIGINT)


def _status(run_dir: Path) -> str:
    return json.loads((run_dir / "manifest.json").read_text())["status"]
