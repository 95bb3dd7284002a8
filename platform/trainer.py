"""Ray Train's trainer without the processes that a run here has no use for.

Ray Train starts an actor for each of its services, the controller included. Every one is a Python process that imports
Ray Train, and often torch, before it does anything: seconds of a core, one after the other, at the start of each run and
of each trial of a sweep. docs/decisions/0014-controller.md has what is lost without them.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, ScalingPolicy
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup

_UNUSED = (
    # Hands out Ray Data sets; tasks read prepared examples.
    DatasetsCallback,
    # Gives the workers' cores back when the controller died but the driver goes on. A single run's controller is the
    # driver; a sweep gives back what its trials held (`platform/leftovers.py`).
    PlacementGroupCleanerCallback,
)


class Trainer(TorchTrainer):
    """`TorchTrainer` for functions that read no Ray Data set, with the controller in the calling process."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, _UNUSED)]

    def _initialize_and_run_controller(self, *, scaling_policy: ScalingPolicy, **options: Any) -> Result:
        if isinstance(scaling_policy, FixedScalingPolicy):
            scaling_policy = _PlainScalingPolicy(scaling_policy.scaling_config)
        controller = _Controller(scaling_policy=scaling_policy, **options)
        asyncio.run(controller.run())
        return controller.get_result()


class _PlainScalingPolicy(FixedScalingPolicy):
    """Asks for nothing beside the placement group, which is a request that an autoscaler sees too.

    Ray's own announces each run to an actor as well, which shares the cluster between training and Ray Data.
    """

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class _WorkerGroup(WorkerGroup):
    """Workers of a controller that is no actor, so that they cannot call it; none of ours would."""

    def _init_train_context_on_workers(
        self, workers: list[Worker], sync_actor: ActorHandle, train_context_args: dict[str, list[Any]]
    ) -> None:
        shared = {
            "train_run_context": self._train_run_context,
            "synchronization_actor": sync_actor,
            "storage_context": self._storage_context,
            "worker_callbacks": self._worker_callbacks_to_propagate,
            "controller_actor": None,
        }
        started = []
        for i, worker in enumerate(workers):
            own = {name: values[i] for name, values in train_context_args.items()}
            own["distributed_context"] = worker.distributed_context
            started.append(worker.actor.init_train_context.remote(**shared, **own))
        ray.get(started)
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):
    worker_group_cls = _WorkerGroup
