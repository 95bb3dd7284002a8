"""Nodes that go: a driver with a small cluster of its own (`python -m node_loss CASE FOLDER`), run by a test.

Ray's simulated nodes are processes of this machine, so a node that is removed ungracefully takes its workers with
it as a machine that loses its power would. The cases:

- `fixed`: one of the two nodes in use goes without notice and a third takes its place; Ray starts both workers again.
- `elastic`: Ray announces that a node will go; the run saves a checkpoint at once and goes on with one worker.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray
import toy_task
from ray.cluster_utils import Cluster

from eagleray.platform.tracking import read_metrics

STEPS = ["train.max_steps=80", "train.eval_every=10", "train.micro_batch_size=4", "optim.eps=0.001"]
PREEMPTED = 2  # the reason in Ray's protocol (autoscaler.proto, DRAIN_NODE_REASON_PREEMPTION)


def main(case: str, folder: Path) -> None:
    """Train a run into `folder`, with a thread that takes a node away."""
    os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "0.5"
    memory = 150 * 2**20
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": memory})
    count = {"fixed": 3, "elastic": 2}[case]
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=memory) for _ in range(count)]
    ray.init(address=cluster.address, log_to_driver=True)

    def remove_node() -> None:
        _wait_for(folder / "checkpoints" / "step-00000020")
        cluster.remove_node(next(filter(_has_worker, nodes)), allow_graceful=False)

    def announce_and_remove_node() -> None:
        while len(read_metrics(folder / "metrics.jsonl")) < 10:
            time.sleep(0.02)
        deadline_ms = int((time.time() + 60) * 1000)
        gcs = cluster.head_node.get_gcs_client()
        gcs.drain_node(nodes[0].node_id, PREEMPTED, "the test takes it", deadline_ms)
        while not list((folder / "checkpoints").glob("step-????????")):  # it has no others before its end
            time.sleep(0.02)
        cluster.remove_node(nodes[0], allow_graceful=False)

    common = [*STEPS, "pause_s=0.05", "ray.max_failures=3"]
    if case == "fixed":
        _train_beside(remove_node, folder, *common, "ray.num_workers=2")
    else:
        elastic = ["ray.num_workers=[1, 2]", "train.eval_every=80"]
        _train_beside(announce_and_remove_node, folder, *common, *elastic)
    ray.shutdown()
    cluster.shutdown()


def _train_beside(disturb: Callable[[], None], run_dir: Path, *overrides: str) -> None:
    thread = threading.Thread(target=disturb)
    thread.start()
    toy_task.train_toy(run_dir, *overrides)
    thread.join()


def _has_worker(node: Any) -> bool:
    [raylet] = node.all_processes["raylet"]
    children = psutil.Process(raylet.process.pid).children(recursive=True)
    return any("RayTrainWorker" in " ".join(child.cmdline()) for child in children)


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
