"""Nodes that go: a driver with a small cluster of its own (`python -m node_loss FOLDER`), run by a test.

Ray's simulated nodes are processes of this machine, so a node that is removed ungracefully takes its workers with
it as a machine that loses its power would. One cluster serves both cases:

- `fixed`: a node of two goes without notice and another takes its place; Ray starts both workers again.
- `elastic`: Ray announces that a node will go; the run saves a checkpoint at once and goes on with one worker.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
import toy_task
from ray.cluster_utils import Cluster

STEPS = ["train.max_steps=60", "train.eval_every=10", "train.micro_batch_size=4", "optim.eps=0.001"]
PREEMPTED = 2  # the reason in Ray's protocol (autoscaler.proto, DRAIN_NODE_REASON_PREEMPTION)


def main(folder: Path) -> None:
    """Train both runs, each with a thread that takes a node away."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 150 * 2**20}
    )
    nodes = [_add_node(cluster)]
    ray.init(address=cluster.address, log_to_driver=True)

    def replace_node() -> None:
        _wait_for(folder / "fixed" / "checkpoints" / "step-00000020")
        cluster.remove_node(nodes[-1], allow_graceful=False)
        nodes.append(_add_node(cluster))

    def announce_and_remove_node() -> None:
        checkpoints = folder / "elastic" / "checkpoints"
        _wait_for(checkpoints / "step-00000020")
        deadline_ms = int((time.time() + 5) * 1000)
        cluster.head_node.get_gcs_client().drain_node(
            nodes[-1].node_id, PREEMPTED, "the test takes it", deadline_ms
        )
        while not any(int(path.name[5:13]) % 10 for path in checkpoints.glob("step-????????")):
            time.sleep(0.02)
        (folder / "saved-on-notice").touch()
        cluster.remove_node(nodes[-1], allow_graceful=False)

    common = [*STEPS, "pause_s=0.05", "ray.max_failures=3"]
    _train_beside(replace_node, folder / "fixed", *common, "ray.num_workers=2")
    _train_beside(announce_and_remove_node, folder / "elastic", *common, "ray.num_workers=[1, 2]")
    ray.shutdown()
    cluster.shutdown()


def _train_beside(disturb: Any, run_dir: Path, *overrides: str) -> None:
    thread = threading.Thread(target=disturb)
    thread.start()
    toy_task.train_toy(run_dir, *overrides)
    thread.join()


def _add_node(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=150 * 2**20)


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
