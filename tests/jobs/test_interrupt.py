"""A driver that is stopped or killed: exit code, a resumable folder, and the same result in the end."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from toy_task import ToyTask, assert_identical, run_workers, toy_command, toy_config, write_toy_data

from eagleray.platform.training import run_training

pytestmark = pytest.mark.ray

RUN = ["train.max_steps=240", "train.eval_every=40", "dropout=0.2"]
PAUSE = "pause_s=0.02"


def _undisturbed(rank: int, folder: str) -> None:
    write_toy_data(Path(folder) / "data")
    cfg = toy_config(*RUN)
    assert run_training(ToyTask(cfg, Path(folder) / "data"), cfg, Path(folder))


def _steps(run_dir: Path) -> list[int]:
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists():
        return []
    whole = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line)["step"] for line in whole]


def _disturb(run_dir: Path, number: signal.Signals) -> tuple[int, str, dict[str, Any]]:
    """Start a driver, send it a signal once it has trained ten more steps; exit code, messages, manifest."""
    command, environment = toy_command(run_dir, *RUN, PAUSE)
    before = max(_steps(run_dir), default=0)
    driver = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 240
    while max(_steps(run_dir), default=0) < before + 10:
        assert driver.poll() is None and time.monotonic() < deadline, driver.communicate()[1]
        time.sleep(0.02)
    driver.send_signal(number)
    _, messages = driver.communicate(timeout=240)
    return driver.returncode, messages, json.loads((run_dir / "manifest.json").read_text())


def test_a_driver_is_interrupted_terminated_and_killed(tmp_path: Path) -> None:
    """Ctrl-C, then SIGTERM, then SIGKILL, then the end: bit-identical to a run that nobody disturbed.

    Ctrl-C and SIGTERM lose no step: the checkpoint is that of the last step that was logged.
    """
    run_dir = tmp_path / "run"
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        returned, messages, manifest = _disturb(run_dir, number)
        assert returned == code, messages
        assert manifest["status"] == manifest["attempts"][-1]["status"] == "interrupted"
        assert f"{number.name}: the run saves a checkpoint at its next step and stops" in messages
        assert "resume the run with" in messages and f"run.dir={run_dir}" in messages
        newest = max(path.name for path in (run_dir / "checkpoints").iterdir())
        assert newest == f"step-{max(_steps(run_dir)):08d}"
    returned, _, manifest = _disturb(run_dir, signal.SIGKILL)
    assert returned == -signal.SIGKILL
    assert manifest["status"] == "running", "nobody was left to say otherwise"

    command, environment = toy_command(run_dir, *RUN, PAUSE)
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((run_dir / "manifest.json").read_text())
    statuses = [attempt["status"] for attempt in manifest["attempts"]]
    assert statuses == ["interrupted", "interrupted", "killed", "finished"]
    run_workers(_undisturbed, 1, str(tmp_path / "whole"))
    assert_identical(run_dir, tmp_path / "whole")
