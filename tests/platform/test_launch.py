"""Training through real Ray Train: placement, a killed worker, errors that speak, resuming in a new driver."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from eagleray.jobs.backbone import pretrain
from eagleray.models.gram.synthetic import make_corpus
from eagleray.platform.cluster import PlacementError
from eagleray.platform.config import ConfigError, load_config
from eagleray.platform.launch import TrainingError

pytestmark = pytest.mark.ray
CLOCK = ("time", "tokens_per_s", "step_s")


def _config(folder: Path, *overrides: str) -> pretrain.Config:
    corpus = folder / "corpus.txt"
    corpus.write_text(make_corpus(40_000, seed=0))
    values = [
        "backbone={vocab_size: 400, width: 32, layers: 2, heads: 2}",
        f"data.paths=[{corpus}]",
        "block_length=32",
    ]
    values += ["train={batch_size: 8, micro_batch_size: 4, max_steps: 30, eval_every: 5, log_every: 5}"]
    values += ["ray={num_workers: 2, max_failures: 1}", "optim.lr=0.003", "tracking.tensorboard=false"]
    return load_config(pretrain.Config, None, [*values, *overrides])


def _records(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def _kill_a_worker_after(checkpoint: Path, killed: list[int]) -> None:
    """SIGKILL one Ray Train worker as soon as a checkpoint exists."""
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                process.kill()
                killed.append(process.pid)
                return


@pytest.mark.usefixtures("ray_cluster")
def test_killed_worker_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker dies by SIGKILL after the first checkpoint; the run ends bit-identical to an undisturbed one."""
    whole = pretrain.main(_config(tmp_path, f"run.dir={tmp_path / 'whole'}"))
    killed: list[int] = []
    killer = threading.Thread(
        target=_kill_a_worker_after, args=(tmp_path / "hit" / "checkpoints" / "step-00000005", killed)
    )
    killer.start()
    hit = pretrain.main(_config(tmp_path, f"run.dir={tmp_path / 'hit'}"))
    killer.join()
    assert killed, "no worker process was found to kill"
    assert hit.summary == whole.summary
    assert _records(hit.path) == _records(whole.path)
    weights = load_file(whole.path / "model" / "model.safetensors")
    for name, weight in load_file(hit.path / "model" / "model.safetensors").items():
        assert torch.equal(weight, weights[name]), name
    manifest = json.loads((whole.path / "manifest.json").read_text())
    assert manifest["status"] == "finished" and list(manifest["data_hashes"]) == [
        str(tmp_path / "corpus.txt")
    ]


@pytest.mark.usefixtures("ray_cluster")
def test_errors_of_workers_reach_the_user_and_the_run_resumes(tmp_path: Path) -> None:
    """A metric that does not exist fails at the first evaluation, with one clear line; the folder stays usable."""
    run_dir = f"run.dir={tmp_path / 'run'}"
    with pytest.raises(
        TrainingError, match=r"`train.metric` is 'bleu'; this job evaluates: loss, perplexity"
    ) as caught:
        pretrain.main(_config(tmp_path, run_dir, "train.metric=bleu", "ray.max_failures=0"))
    assert "Resume with `run.dir=" in str(caught.value)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"
    with pytest.raises(ConfigError, match=r"another config:\n  - train.metric: 'bleu' -> None"):
        pretrain.main(_config(tmp_path, run_dir, "ray.max_failures=0"))


@pytest.mark.usefixtures("ray_cluster")
def test_what_cannot_be_placed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        PlacementError,
        match=r"needs 9 worker\(s\) x 1 CPU; the cluster has 1 node\(s\) with 4 CPU .* at most 4",
    ):
        pretrain.main(_config(tmp_path, "ray.num_workers=9", "train.batch_size=36"))
    with pytest.raises(PlacementError, match=r"2 worker\(s\) x 1 CPU \+ 1 GPU; .* 0 GPU"):
        pretrain.main(_config(tmp_path, "ray.use_gpu=true"))
