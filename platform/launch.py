"""From a job on the driver to the training loop in Ray Train workers, and back."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagleray.platform.cluster import check_placement, check_shared_folder, connected, wants_gpu
from eagleray.platform.config import validate_config
from eagleray.platform.plots import plot_training
from eagleray.platform.progress import training_progress
from eagleray.platform.remote import leads_node, open_folder
from eagleray.platform.runs import RunFolder, RunInterrupted
from eagleray.platform.sections import RaySection, TrainingConfig
from eagleray.platform.stopping import SignalStop, withdraw_stop
from eagleray.platform.task import Task
from eagleray.platform.training import run_training, total_steps


class TrainingError(ValueError):
    """A training run stopped; the message is the workers' reason and how to go on."""


@dataclass(frozen=True)
class TrainedRun:
    """A finished training run."""

    path: Path
    """The run folder; the model lies in `model/`."""
    summary: dict[str, float]
    """What `run_training` returned."""


def train(
    task_class: type[Task],
    cfg: TrainingConfig,
    *,
    job: str,
    prepare: Callable[[RunFolder], None],
    callbacks: Sequence[Any] = (),
    trainer_class: type[Any] | None = None,
    data_of: Path | None = None,
) -> TrainedRun:
    """Run a training job: run folder, prepared examples, Ray Train with DeepSpeed, report and plots.

    Args:
        task_class: The method's task; an importable top-level class.
        cfg: The job's config.
        job: The job's name in run folders.
        prepare: Writes the examples that the task reads into `run.data`; called for a new run only.
        callbacks: Ray Train callbacks, e.g. Tune's `TuneReportCallback`.
        trainer_class: Used in place of Ray Train's `TorchTrainer`, e.g. `leftovers.TrialTrainer`.
        data_of: Run folder whose prepared examples are used, in place of preparing the same ones again.

    Raises:
        PlacementError: The cluster cannot hold the run.
        SharedStorageError: The run folder is not the same on all nodes.
        TrainingError: A worker failed more often than `ray.max_failures`.
        RunInterrupted: The run was asked to stop, by a signal or by the file `stop` in its folder.
    """
    with RunFolder.create(job, cfg).recording() as run:
        if not run.resumed:
            _prepare_data(run, prepare, data_of)
            run.folder.send_data()
        with connected(cfg.ray):
            check_placement(cfg.ray)
            check_shared_folder(cfg.ray, run.folder)
            run.leave_to_workers()
            summary = _fit(task_class, cfg, run, job, callbacks, trainer_class)
        run.folder.receive_results()
        run.write_report(summary)
        plot_training(run.path)
    return TrainedRun(run.path, summary)


def _prepare_data(run: RunFolder, prepare: Callable[[RunFolder], None], data_of: Path | None) -> None:
    if run.data.is_symlink():
        run.data.unlink()
    shutil.rmtree(run.data, ignore_errors=True)
    if data_of is None:
        prepare(run)
        return
    other = RunFolder(data_of)
    run.data.symlink_to(os.path.relpath(other.data.resolve(), run.path.resolve()), target_is_directory=True)
    run.update_manifest(data_hashes=other.read_manifest()["data_hashes"])


def _fit(
    task_class: type[Task],
    cfg: TrainingConfig,
    run: RunFolder,
    job: str,
    callbacks: Sequence[Any],
    trainer_class: type[Any] | None,
) -> dict[str, float]:
    steps = total_steps(cfg.train, len(task_class(cfg, run.data).train_lengths))
    loop = {
        "task": f"{task_class.__module__}:{task_class.__qualname__}",
        "config": cfg.model_dump(mode="json"),
        "config_class": f"{type(cfg).__module__}:{type(cfg).__qualname__}",
        "run_dir": run.folder.place,
        "threads": max(1, int(cfg.ray.cpus_per_worker)),
    }
    with training_progress(
        run.path, total_steps=min(steps, cfg.train.stop_at or steps), description=cfg.run.note or job
    ):
        return run_workers(
            _train_worker, loop, cfg.ray, run, callbacks=callbacks, trainer_class=trainer_class
        )


def run_workers(
    worker: Callable[[dict[str, Any]], dict[str, float] | None],
    loop: dict[str, Any],
    section: RaySection,
    run: RunFolder,
    *,
    callbacks: Sequence[Any] = (),
    trainer_class: type[Any] | None = None,
) -> dict[str, float]:
    """Run a function in Ray Train workers until it ends, answering signals meanwhile; needs a connection to Ray.

    Args:
        worker: What each worker runs; returns `None` if it stopped because `stopping.stop_requested`. It resumes by
            itself when it is started again in the same run folder.
        loop: Its argument.
        section: Workers and their resources.
        run: The run folder.
        callbacks: Ray Train callbacks.
        trainer_class: Used in place of Ray Train's `TorchTrainer`.

    Returns:
        What worker 0 returned.

    Raises:
        TrainingError: A worker failed more often than `ray.max_failures`.
        RunInterrupted: The run was asked to stop.
    """
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    use_gpu = wants_gpu(section)
    trainer = (trainer_class or TorchTrainer)(
        worker,
        train_loop_config=loop,
        scaling_config=ray.train.ScalingConfig(
            num_workers=section.num_workers,
            elastic_resize_monitor_interval_s=section.resize_every_s,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": section.cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
        ),
        # A name of its own for every attempt: Ray resumes silently when a name is used again, and
        # resuming is the loop's work (docs/decisions/0002-checkpoints.md).
        run_config=ray.train.RunConfig(
            name=f"attempt-{len(run.read_manifest()['attempts'])}",
            storage_path=str(run.path / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=section.max_failures),
            callbacks=list(callbacks),
        ),
    )
    withdraw_stop(run.folder)
    stop = SignalStop(run.folder)
    try:
        summary = stop.call(lambda: trainer.fit().return_value)
    except TrainingFailedError as error:
        raise TrainingError(f"{_reason(error)} Resume with `run.dir={run.folder.place}`.") from error
    except KeyboardInterrupt:
        raise RunInterrupted(run.folder.place, stop.received or signal.SIGINT) from None
    if summary is None:
        raise RunInterrupted(run.folder.place, stop.received or signal.SIGINT)
    return summary


def _train_worker(loop: dict[str, Any]) -> dict[str, float] | None:
    """What runs in each Ray Train worker."""
    import ray.train
    import torch
    import torch.distributed as dist
    from transformers.utils import logging as transformers_logging

    # Ray would log every report of every worker; our own progress says what matters.
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("eagleray").setLevel(logging.INFO)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(loop["threads"])
    cfg = validate_config(_load(loop["config_class"]), loop["config"], "worker")
    folder = open_folder(loop["run_dir"])
    if leads_node():
        folder.receive_data()
    dist.barrier()
    task = _load(loop["task"])(cfg, folder.path / "data")
    return run_training(task, cfg, folder, report=ray.train.report, evicted=_evicted)


def _evicted() -> bool:
    """Whether Ray has told this worker that a machine of the run will be taken away.

    `ray.train.get_preemption_info` says the same but makes all workers wait for one another through an actor,
    far too slow for every step; the loop agrees on the answer in a message of its own.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def _load(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def _reason(error: Exception) -> str:
    """The failure that explains the others: when one worker stops, the rest fail over the lost connection."""
    failures = [
        (rank, getattr(f, "cause", None) or f) for rank, f in getattr(error, "worker_failures", {}).items()
    ]
    if not failures:
        return f"{error}"
    rank, cause = min(failures, key=lambda failure: (not isinstance(failure[1], ValueError), failure[0]))
    # Ray puts the worker's traceback into the exception's text; its last paragraph is the reason.
    text = str(cause).strip().splitlines()
    return f"Worker {rank}: {text[-1] if text else type(cause).__name__}"
