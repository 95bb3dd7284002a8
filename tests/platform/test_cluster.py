"""What fits the cluster."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import ray

from eagleray.platform.cluster import PlacementError, check_placement, describe_needs, driver_is_gone
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
