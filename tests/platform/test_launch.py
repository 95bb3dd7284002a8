"""Training through real Ray Train: placement, a killed worker, errors that speak, resuming in a new driver."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import node_loss
import psutil
import pytest
from toy_task import assert_identical, read_run, train_toy, train_undisturbed

from eagleray.jobs.backbone import pretrain
from eagleray.models.gram.synthetic import make_corpus
from eagleray.platform.cluster import PlacementError
from eagleray.platform.config import ConfigError, load_config
from eagleray.platform.launch import TrainingError

pytestmark = pytest.mark.ray


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


def _kill_workers(checkpoints: Path, killed: list[list[int]]) -> None:
    """SIGKILL one Ray Train worker at the first checkpoint, and all of them at a later one."""
    for step, how_many in ((5, 1), (15, None)):
        deadline = time.monotonic() + 120
        while not (checkpoints / f"step-{step:08d}").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        workers = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    workers.append(process)
        for worker in workers[:how_many]:
            worker.kill()
        killed.append([worker.pid for worker in workers[:how_many]])


@pytest.mark.usefixtures("ray_cluster")
def test_killed_workers_change_nothing(tmp_path: Path) -> None:
    """One worker, later all of them, die by SIGKILL; the run ends bit-identical to an undisturbed one."""
    run = ["train.max_steps=30", "train.eval_every=5", "train.micro_batch_size=4", "dropout=0.2"]
    killed: list[list[int]] = []
    killer = threading.Thread(target=_kill_workers, args=(tmp_path / "hit" / "checkpoints", killed))
    killer.start()
    train_toy(tmp_path / "hit", *run, "pause_s=0.05", "ray={num_workers: 2, max_failures: 2}")
    killer.join()
    assert [len(pids) for pids in killed] == [1, 2]
    assert json.loads((tmp_path / "hit" / "manifest.json").read_text())["status"] == "finished"
    train_undisturbed(tmp_path / "whole", *run, workers=2)
    assert_identical(tmp_path / "hit", tmp_path / "whole")


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


def _lose_node(case: str, run_dir: Path) -> str:
    """A run of `node_loss.py`; returns its messages."""
    command = [sys.executable, "-m", "node_loss", case, str(run_dir)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.soak
def test_a_lost_node_is_replaced(tmp_path: Path) -> None:
    """It goes without notice, another one is there: bit-identical to an undisturbed run."""
    _lose_node("fixed", tmp_path / "hit")
    train_undisturbed(tmp_path / "whole", *node_loss.STEPS, workers=2)
    assert_identical(tmp_path / "hit", tmp_path / "whole")


@pytest.mark.soak
def test_an_announced_loss_leaves_one_worker(tmp_path: Path) -> None:
    """A node goes with notice and none takes its place: a checkpoint at once, and one worker goes on from it."""
    messages = _lose_node("elastic", tmp_path / "hit")
    assert "is about to be taken away: a checkpoint is saved at step" in messages
    train_undisturbed(tmp_path / "whole", *node_loss.STEPS, workers=2)
    trained, expected = (
        [record for record in read_run(tmp_path / name)[0] if record["kind"] == "train"]
        for name in ("hit", "whole")
    )
    assert [record["step"] for record in trained] == [record["step"] for record in expected]
    losses = [record["loss"] for record in trained]
    assert losses == pytest.approx([record["loss"] for record in expected], abs=1e-4)
    [checkpoint] = (tmp_path / "hit" / "checkpoints").glob("step-00000080")
    assert json.loads((checkpoint / "checkpoint.json").read_text())["world_size"] == 1
