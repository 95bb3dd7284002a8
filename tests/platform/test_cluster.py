"""What fits the cluster."""

from __future__ import annotations

import pytest
import ray

from eagleray.platform.cluster import PlacementError, check_placement, describe_needs
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
