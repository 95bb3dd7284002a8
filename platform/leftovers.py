"""Giving back what a training run holds after its trial was stopped.

Tune ends a trial by ending its process; Ray then ends the Train controller and the workers, which that process
owns. The placement group that reserves the workers' cores and GPUs stays: Ray removes a group only when both
the actor that made it and the job (the driver's session) are gone. Train's own remedy is a detached actor for
each run, which asks the dashboard whether the controller lives. It fails where there is no dashboard, or where
the machine runs a second cluster, and then stays behind itself. So runs do without it (`platform/trainer.py`), and
the driver, which outlives its trials, asks Ray's control service directly.

docs/decisions/0004-sweeps.md has the alternatives.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import ray
from ray._private.state import state as global_state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # pyright: ignore[reportAttributeAccessIssue]
from ray.util.placement_group import PlacementGroup, remove_placement_group

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Group:
    """A placement group that an actor of this job made and that is not removed."""

    id: bytes
    orphaned: bool
    """The actor that made it is dead, so nobody can use it or give it back any more."""


class Leftovers:
    """The placement groups that training runs of this driver leave behind from now on."""

    def __init__(self) -> None:
        self._before = {group.id for group in _groups_of_actors()}

    def release(self) -> int:
        """Remove the groups whose maker is dead; return how many are left, those in use included."""
        groups = [group for group in _groups_of_actors() if group.id not in self._before]
        for group in groups:
            if group.orphaned:
                logger.debug("Releasing placement group %s.", group.id.hex())
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.id)))
        return len(groups)

    def settle(self, timeout_s: float = 10.0) -> None:
        """Release until no group is left; for when all runs have ended and their processes are about to."""
        deadline = time.monotonic() + timeout_s
        while left := self.release():
            if time.monotonic() > deadline:
                logger.warning("%d placement group(s) of this sweep are still in use.", left)
                return
            time.sleep(0.2)


def _groups_of_actors() -> list[_Group]:
    """Groups of this job that an actor made (not the driver, whose groups are Tune's own).

    Ray's public table of groups does not tell their makers, hence the look at its source.
    """
    job = ray.get_runtime_context().get_job_id()
    groups = []
    for row in global_state._connect_and_get_accessor().get_placement_group_table():
        data = PlacementGroupTableData.FromString(row)
        made_by_actor = not ray.ActorID(data.creator_actor_id).is_nil()
        removed = data.state == PlacementGroupTableData.REMOVED
        if data.creator_job_id.hex() == job and made_by_actor and not data.is_detached and not removed:
            groups.append(_Group(data.placement_group_id, data.creator_actor_dead))
    return groups
