"""Ctrl-C in a real training run: exit code 130, a resumable folder, and the same result in the end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from eagleray.models.gram.synthetic import make_corpus

pytestmark = pytest.mark.ray


def _start(config: Path, run_dir: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "eagleray.jobs.backbone.pretrain",
        "--config",
        str(config),
        f"run.dir={run_dir}",
    ]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def test_ctrl_c_leaves_a_run_that_resumes(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(make_corpus(40_000, seed=0))
    config = tmp_path / "config.yaml"
    values = {
        "job": "backbone.pretrain",
        "backbone": {"vocab_size": 400, "width": 32, "layers": 2, "heads": 2},
        "data": {"paths": [str(tmp_path / "corpus.txt")]},
        "block_length": 32,
        "train": {
            "batch_size": 8,
            "micro_batch_size": 8,
            "max_steps": 400,
            "eval_every": 20,
            "log_every": 20,
        },
        "tracking": {"tensorboard": False},
    }
    config.write_text(yaml.safe_dump(values))
    run_dir = tmp_path / "run"
    first = _start(config, run_dir)
    deadline = time.monotonic() + 120
    while not (run_dir / "checkpoints" / "step-00000020").exists() and time.monotonic() < deadline:
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    _, messages = first.communicate(timeout=120)
    assert first.returncode == 130, messages
    assert "resume the run with" in messages and f"run.dir={run_dir}" in messages
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["status"] == "interrupted"
    done = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert done and max(done) < 400

    second = _start(config, run_dir)
    _, messages = second.communicate(timeout=240)
    assert second.returncode == 0, messages
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["status"] == "finished" and len(manifest["attempts"]) == 2
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert (
        steps == sorted(steps) and steps[-1] == 400 and len(steps) == 2 * 20
    )  # one train and one eval line each
