"""Ray Train's trainer without the helper processes that a run here has no use for.

Ray Train starts an actor for each of its services. Every one is a Python process that imports Ray Train before it
does anything: seconds of a core at the start of each run, of each trial of a sweep and after each failure.
"""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

_UNUSED = (
    # Hands out Ray Data sets; tasks read prepared examples.
    DatasetsCallback,
    # Gives the workers' cores back when the controller died but the driver goes on. A single run's driver ends then,
    # which gives them back; a sweep's does so itself (`platform/leftovers.py`).
    PlacementGroupCleanerCallback,
)


class Trainer(TorchTrainer):
    """`TorchTrainer` for functions that read no Ray Data set."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, _UNUSED)]
