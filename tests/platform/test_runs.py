"""Run folders: what is recorded, when a run is resumed and when that is refused."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from eagleray.platform import storage
from eagleray.platform.config import ConfigError, load_config
from eagleray.platform.environment import git_state
from eagleray.platform.runs import FREE_ON_RESUME, RunFinishedError, RunFolder, RunInterrupted
from eagleray.platform.sections import TrainingConfig

JOB = "toy.train"


def config(folder: Path | str, *overrides: str) -> TrainingConfig:
    return load_config(TrainingConfig, None, [f"run.dir={folder}", *overrides])


def leave_progress(run: RunFolder) -> None:
    run.metrics.write_text('{"step": 1, "kind": "train", "time": 0, "loss": 1.0}\n')


def crash(folder: Path, *overrides: str) -> None:
    """A run that logged something and failed."""
    run = RunFolder.create(JOB, config(folder, *overrides))
    with pytest.raises(RuntimeError, match="boom"), run.recording():
        leave_progress(run)
        raise RuntimeError("boom")


def test_config_and_manifest_exist_before_anything_runs(tmp_path: Path) -> None:
    run = RunFolder.create(JOB, load_config(TrainingConfig, None, [f"run.root={tmp_path}", "train.seed=7"]))
    assert run.path.parent == tmp_path / JOB
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{6}", run.path.name)
    assert yaml.safe_load(run.config.read_text())["train"]["seed"] == 7
    manifest = run.read_manifest()
    assert manifest["status"] == "created"
    assert manifest["seeds"] == {"train.seed": 7}
    assert manifest["packages"]["torch"] == torch.__version__.split("+")[0]
    assert manifest["hardware"]["cpus"] >= 1
    assert len(manifest["config_hash"]) == 64
    assert manifest["attempts"][0]["process"] == os.getpid()
    assert not run.resumed


def test_two_new_runs_never_share_a_folder(tmp_path: Path) -> None:
    cfg = load_config(TrainingConfig, None, [f"run.root={tmp_path}"])
    assert RunFolder.create(JOB, cfg).path != RunFolder.create(JOB, cfg).path


def test_a_finished_run(tmp_path: Path) -> None:
    run = RunFolder.create(JOB, config(tmp_path / "run", "run.note=first try"))
    with run.recording():
        assert run.read_manifest()["status"] == "running"
        run.update_manifest(data_hashes={"a": "1"})
        run.update_manifest(data_hashes={"b": "2"})
    manifest = run.read_manifest()
    assert manifest["status"] == manifest["attempts"][0]["status"] == "finished"
    assert manifest["note"] == "first try"
    assert manifest["data_hashes"] == {"a": "1", "b": "2"}
    assert manifest["wall_seconds"] >= 0
    assert manifest["created"] <= manifest["started"] <= manifest["ended"]
    with pytest.raises(RunFinishedError, match=r"this run has finished.*Set another `run\.dir`"):
        RunFolder.create(JOB, config(tmp_path / "run"))


def test_a_failed_run_keeps_the_error_and_its_traceback(tmp_path: Path) -> None:
    run = RunFolder.create(JOB, config(tmp_path / "run"))
    with pytest.raises(RuntimeError, match="boom") as caught, run.recording():
        raise RuntimeError("boom")
    attempt = run.read_manifest()["attempts"][0]
    assert run.read_manifest()["status"] == "failed"
    assert attempt["error"] == "RuntimeError: boom"
    assert "test_runs.py" in attempt["traceback"]
    assert caught.value.__notes__ == [f"Run folder: {run.path}"]


@pytest.mark.parametrize(
    ("stop", "number"),
    [
        (KeyboardInterrupt(), signal.SIGINT),
        (SystemExit(15), signal.SIGTERM),  # Ray's answer to SIGTERM
        (RunInterrupted(Path("run"), signal.SIGTERM), signal.SIGTERM),
    ],
)
def test_an_interrupted_run_says_where_it_is(
    tmp_path: Path, stop: BaseException, number: signal.Signals
) -> None:
    run = RunFolder.create(JOB, config(tmp_path / "run"))
    with pytest.raises(RunInterrupted) as caught, run.recording():
        raise stop
    assert Path(caught.value.place).name == run.path.name
    assert caught.value.signal == number
    assert run.read_manifest()["status"] == "interrupted"


def test_resume_appends_an_attempt_and_adds_up_the_time(tmp_path: Path) -> None:
    crash(tmp_path / "run")
    run = RunFolder.create(JOB, config(tmp_path / "run"))
    assert run.resumed
    with run.recording():
        pass
    manifest = run.read_manifest()
    assert [attempt["status"] for attempt in manifest["attempts"]] == ["failed", "finished"]
    total = sum(attempt["wall_seconds"] for attempt in manifest["attempts"])
    assert manifest["wall_seconds"] == pytest.approx(total)


def test_resume_with_another_config_names_the_keys(tmp_path: Path) -> None:
    crash(tmp_path / "run", "lora={rank: 4}")
    records = [tmp_path / "run" / name for name in ("config.yaml", "manifest.json", "metrics.jsonl")]
    before = [path.read_bytes() for path in records]
    expected = (
        r"(?s)another config:\n  - optim\.lr: 1e-05 -> 2e-05\n  - lora\.rank: 4 -> 8\nTake the old values"
    )
    with pytest.raises(ConfigError, match=expected):
        RunFolder.create(JOB, config(tmp_path / "run", "lora={rank: 8}", "optim.lr=2e-5"))
    assert [path.read_bytes() for path in records] == before


@pytest.mark.parametrize(
    "override",
    [
        "run.note=again",
        "tracking.tensorboard=false",
        "ray.address=auto",
        "ray.max_failures=3",
        "ray.num_workers=2",
    ],
)
def test_keys_that_may_differ_on_resume(tmp_path: Path, override: str) -> None:
    assert any(override.startswith(key) for key in FREE_ON_RESUME)
    crash(tmp_path / "run")
    assert RunFolder.create(JOB, config(tmp_path / "run", override)).resumed


def test_an_attempt_that_left_nothing_may_be_corrected(tmp_path: Path) -> None:
    run = RunFolder.create(JOB, config(tmp_path / "run", "optim.lr=1"))
    with pytest.raises(ValueError, match="no data"), run.recording():
        run.update_manifest(data_hashes={"old": "1"})
        raise ValueError("no data")
    again = RunFolder.create(JOB, config(tmp_path / "run", "optim.lr=2"))
    assert not again.resumed
    assert yaml.safe_load(again.config.read_text())["optim"]["lr"] == 2
    assert again.read_manifest()["data_hashes"] == {}
    assert len(again.read_manifest()["attempts"]) == 2


@pytest.mark.parametrize(
    ("scheme", "part"),
    [("", "candidates"), ("", "scores"), ("", "trials"), ("file://", "scores"), ("file://", "trials")],
)
def test_parts_of_an_attempt_are_not_mixed_with_those_of_another_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, part: str
) -> None:
    monkeypatch.setenv("EAGLERAY_WORK_DIR", str(tmp_path / "work"))
    place = f"{scheme}{tmp_path / 'run'}"
    RunFolder.create(JOB, config(place, "optim.lr=1")).close()  # type: ignore[arg-type]
    (tmp_path / "run" / part).mkdir()
    (tmp_path / "run" / part / "0001").touch()
    with pytest.raises(ConfigError, match=r"another config:\n  - optim.lr: 1"):
        RunFolder.create(JOB, config(place, "optim.lr=2"))  # type: ignore[arg-type]


def test_an_edited_config_file_does_not_fool_the_guard(tmp_path: Path) -> None:
    crash(tmp_path / "run")
    path = tmp_path / "run/config.yaml"
    path.write_text(path.read_text().replace("lr: 1.0e-05", "lr: 0.5"))
    with pytest.raises(ConfigError, match=r"config\.yaml was edited after the run had started"):
        RunFolder.create(JOB, config(tmp_path / "run", "optim.lr=0.5"))


def test_another_job_is_refused(tmp_path: Path) -> None:
    crash(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"holds a run of `toy\.train`, not of `toy\.other`"):
        RunFolder.create("toy.other", config(tmp_path / "run"))


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"is not a run folder: it holds `thesis\.tex` but no config\.yaml"):
        RunFolder.create(JOB, config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"run: the run folder cannot be written \(Not a directory\)"):
        RunFolder.create(JOB, config(tmp_path / "file" / "run"))


def test_a_full_disk_does_not_hide_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder.create(JOB, config(tmp_path / "run"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RuntimeError, match="boom"), run.recording():
        monkeypatch.setattr(storage, "write_text", full)
        raise RuntimeError("boom")


def test_one_run_has_one_driver(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = RunFolder.create(JOB, config(folder))
    assert storage.is_locked(folder)
    with pytest.raises(
        ConfigError, match=rf"in use by process {os.getpid()} on .* since .*Wait for it to end"
    ):
        RunFolder.create(JOB, config(folder))
    with run.recording():
        assert storage.is_locked(folder)
    assert not storage.is_locked(folder)


def test_a_refused_resume_gives_the_lock_back(tmp_path: Path) -> None:
    crash(tmp_path / "run")
    with pytest.raises(ConfigError, match="another config"):
        RunFolder.create(JOB, config(tmp_path / "run", "optim.lr=1"))
    assert not storage.is_locked(tmp_path / "run")


def test_the_lock_of_a_killed_driver_is_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = f"""
        import sys, time
        from eagleray.platform.config import load_config
        from eagleray.platform.runs import RunFolder
        from eagleray.platform.sections import TrainingConfig
        run = RunFolder.create({JOB!r}, load_config(TrainingConfig, None, ["run.dir={folder}"]))
        with run.recording():
            run.metrics.write_text("one step")
            print("ready", flush=True)
            time.sleep(60)
    """
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    with driver:
        assert driver.stdout.readline() == "ready\n"
        with pytest.raises(ConfigError, match=f"in use by process {driver.pid} on"):
            RunFolder.create(JOB, config(folder))
        driver.send_signal(signal.SIGKILL)
    run = RunFolder.create(JOB, config(folder))
    assert run.resumed
    assert [attempt["status"] for attempt in run.read_manifest()["attempts"]] == ["killed", "created"]


def test_report_holds_plain_json(tmp_path: Path) -> None:
    run = RunFolder.create(JOB, config(tmp_path / "run"))
    run.write_report(
        {"a": torch.tensor(0.5), "b": np.float32(2), "c": [math.nan, math.inf, 1], "d": {"e": Path("x")}}
    )
    assert json.loads(run.report.read_text()) == {"a": 0.5, "b": 2.0, "c": [None, None, 1], "d": {"e": "x"}}


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    storage.write_json(path, {"x": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write_json(path, {"x": 2})
    assert storage.read_json(path) == {"x": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    crash(tmp_path / "run")
    (tmp_path / "run/manifest.json").write_text('{"job": ')
    with pytest.raises(storage.DamagedFileError, match=r"manifest\.json is damaged"):
        RunFolder.create(JOB, config(tmp_path / "run"))


def test_git_state(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "first")
    state = git_state(tmp_path)
    assert state is not None
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {**state, "dirty": True}
    (tmp_path / "sub").mkdir()
    assert git_state(tmp_path / "sub") is None


def test_the_hash_is_that_of_the_experiment(tmp_path: Path) -> None:
    def recorded_hash(name: str, *overrides: str) -> str:
        return RunFolder.create(JOB, config(tmp_path / name, *overrides)).read_manifest()["config_hash"]

    assert recorded_hash("a") == recorded_hash("b", "ray.address=auto", "run.note=again")
    assert recorded_hash("c") != recorded_hash("d", "optim.lr=1")
