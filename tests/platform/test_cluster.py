"""What fits the cluster."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from typing import Any

import pytest
import ray

from eagleray.platform.cluster import (
    PlacementError,
    check_placement,
    connected,
    describe_needs,
    driver_is_gone,
)
from eagleray.platform.sections import RaySection


@pytest.mark.parametrize(
    ("nodes", "section", "expected"),
    [
        ([{"CPU": 8}], RaySection(num_workers=2), 4),
        ([{"CPU": 8}], RaySection(num_workers=3), 2),
        (
            [{"CPU": 3}, {"CPU": 3}],
            RaySection(num_workers=1, cpus_per_worker=2),
            2,
        ),  # a worker never spans nodes
        ([{"CPU": 64, "GPU": 4}], RaySection(num_workers=2, cpus_per_worker=8), 2),  # GPUs are what is short
        ([{"CPU": 64, "GPU": 1}], RaySection(num_workers=2, cpus_per_worker=8), 4),  # too few: none is used
        ([{"CPU": 1}], RaySection(num_workers=2), 0),
    ],
)
def test_how_many_runs_fit(
    nodes: list[dict[str, float]], section: RaySection, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    dead = {"Alive": False, "Resources": {"CPU": 1000}}
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)
    monkeypatch.setattr(ray, "nodes", lambda: [dead, *({"Alive": True, "Resources": n} for n in nodes)])
    if expected:
        assert check_placement(section) == expected
    else:
        with pytest.raises(PlacementError, match=r"needs 2 worker\(s\) x 1 CPU; .*places at most 1 such"):
            check_placement(section)


def test_needs_are_told_with_gpus() -> None:
    assert describe_needs(RaySection(num_workers=2, use_gpu=True)) == "2 worker(s) x 1 CPU + 1 GPU"


_DRIVER = """
import sys, ray
from eagleray.platform.cluster import driver_is_gone

class Actor:
    def ask(self):
        return driver_is_gone()

ray.init(address=sys.argv[1], namespace="gone")
actor = ray.remote(num_cpus=0)(Actor).options(name="asked", lifetime="detached").remote()
print(ray.get(actor.ask.remote()), flush=True)
sys.stdin.read()
"""


START_TWICE = """
import logging, sys
import psutil, ray
from ray._private import services
from eagleray.platform.cluster import start_ray

logging.basicConfig()
get_node = services.get_node

def busy(*arguments):
    services.get_node = get_node
    raise Exception("The current node timed out during startup.")

services.get_node = busy
start_ray(address="local", num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False, _temp_dir=sys.argv[1])
print(ray.cluster_resources()["CPU"])
print(sum(process.name() == "raylet" for process in psutil.Process().children(recursive=True)))
"""


@pytest.mark.ray
def test_ray_starts_again_on_a_busy_machine() -> None:
    """What the failed attempt started is gone."""
    with tempfile.TemporaryDirectory(prefix="er-", dir="/tmp") as folder:
        done = subprocess.run(
            [sys.executable, "-c", START_TWICE, folder],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
    assert done.stdout.split() == ["1.0", "1"]
    assert "did not start within its 30 s, attempt 1 of 4" in done.stderr


@pytest.mark.parametrize(
    ("reason", "attempts", "message"),
    [
        ("The current node timed out during startup.", 4, "in 4 attempts: this machine is too busy"),
        ("No space left on device", 1, "No space left on device"),
    ],
)
def test_ray_does_not_start(
    reason: str, attempts: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def init(**options: Any) -> None:
        calls.append(options)
        raise RuntimeError(reason)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(PlacementError, match=message), connected(RaySection()):
        pass
    assert len(calls) == attempts and {options["address"] for options in calls} == {"local"}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_an_actor_knows_that_its_driver_was_killed() -> None:
    """A detached one lives on to tell."""
    address = ray.get_runtime_context().gcs_address
    with subprocess.Popen(
        [sys.executable, "-c", _DRIVER, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline().strip() == "False"
        driver.kill()
    actor = ray.get_actor("asked", namespace="gone")
    try:
        deadline = time.monotonic() + 60
        while not (gone := ray.get(actor.ask.remote())) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert gone
    finally:
        ray.kill(actor)
    assert not driver_is_gone()
