"""Placement groups whose maker died are released, and no others."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from eagleray.platform.leftovers import Leftovers

SHARE = {"CPU": 0.25}
"""Four groups find room beside whatever other tests left running."""

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@ray.remote(num_cpus=0)
class Maker:
    """Makes a placement group, like Ray Train's controller."""

    def make(self) -> str:
        group = placement_group([SHARE])
        ray.get(group.ready(), timeout=60)
        return group.id.hex()


def make_group() -> tuple[Any, str]:
    maker = Maker.remote()
    return maker, ray.get(maker.make.remote())


def state(group: str) -> str:
    return placement_group_table()[group]["state"]


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_release() -> None:
    cores = ray.available_resources()["CPU"]
    earlier, earlier_group = make_group()
    leftovers = Leftovers()
    own = placement_group([SHARE])
    alive, alive_group = make_group()
    dead, dead_group = make_group()
    assert leftovers.release() == 2  # of the two since then, both in use

    ray.kill(dead)
    ray.kill(earlier)
    assert eventually(lambda: leftovers.release() == 1)
    assert eventually(lambda: state(dead_group) == "REMOVED")
    assert [state(g) for g in (alive_group, earlier_group, own.id.hex())] == ["CREATED"] * 3

    ray.kill(alive)
    leftovers.settle()
    assert state(alive_group) == "REMOVED"
    for group in (own, PlacementGroup(ray.PlacementGroupID.from_hex(earlier_group))):
        remove_placement_group(group)
    assert eventually(lambda: ray.available_resources()["CPU"] == cores)
