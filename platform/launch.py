"""From a job on the driver to the training loop in Ray Train workers, and back."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagleray.platform.cluster import (
    check_placement,
    check_shared_folder,
    connected,
    driver_is_gone,
    wants_gpu,
    worker_nodes,
)
from eagleray.platform.progress import training_progress
from eagleray.platform.remote import open_folder
from eagleray.platform.runs import RunFolder, RunInterrupted, manifest_at
from eagleray.platform.sections import RaySection, TrainingConfig
from eagleray.platform.stopping import SignalStop, withdraw_stop
from eagleray.platform.task import Task
from eagleray.platform.training import total_steps
from eagleray.platform.worker import train_worker


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
    data_of: str | None = None,
) -> TrainedRun:
    """Run a training job: run folder, prepared examples, Ray Train with DeepSpeed, report and plots.

    Args:
        task_class: The method's task; an importable top-level class.
        cfg: The job's config.
        job: The job's name in run folders.
        prepare: Writes the examples that the task reads into `run.data`; called for a new run only.
        callbacks: Ray Train callbacks, called in this process.
        data_of: Run folder, a path or URI, whose prepared examples are used, in place of preparing the same ones again.

    Raises:
        PlacementError: The cluster cannot hold the run.
        SharedStorageError: The run folder is not the same on all nodes.
        TrainingError: A worker failed more often than `ray.max_failures`.
        RunInterrupted: The run was asked to stop, by a signal or by the file `stop` in its folder.
    """
    from eagleray.platform.plots import plot_training  # matplotlib, which workers import this module without

    with RunFolder.create(job, cfg).recording() as run:
        if not run.resumed:
            _prepare_data(run, prepare, data_of)
            run.folder.send_data()
        with connected(cfg.ray):
            check_placement(cfg.ray)
            check_shared_folder(cfg.ray, run.folder)
            run.leave_to_workers()
            summary = _fit(task_class, cfg, run, job, callbacks)
        run.folder.receive_results()
        run.write_report(summary)
        plot_training(run.path)
    return TrainedRun(run.path, summary)


def _prepare_data(run: RunFolder, prepare: Callable[[RunFolder], None], data_of: str | None) -> None:
    if run.data.is_symlink():
        run.data.unlink()
    shutil.rmtree(run.data, ignore_errors=True)
    if data_of is None:
        prepare(run)
        return
    open_folder(data_of).copy_to("data", run.data)
    run.update_manifest(data_hashes=manifest_at(data_of)["data_hashes"])


def _fit(
    task_class: type[Task],
    cfg: TrainingConfig,
    run: RunFolder,
    job: str,
    callbacks: Sequence[Any],
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
        return run_workers(train_worker, loop, cfg.ray, run, callbacks=callbacks)


def run_workers(
    worker: Callable[[dict[str, Any]], dict[str, float] | None],
    loop: dict[str, Any],
    section: RaySection,
    run: RunFolder,
    *,
    callbacks: Sequence[Any] = (),
) -> dict[str, float]:
    """Run a function in Ray Train workers until it ends, answering signals meanwhile; needs a connection to Ray.

    Args:
        worker: What each worker runs; returns `None` if it stopped because `stopping.stop_requested`. It resumes by
            itself when it is started again in the same run folder.
        loop: Its argument.
        section: Workers and their resources.
        run: The run folder.
        callbacks: Ray Train callbacks.

    Returns:
        What worker 0 returned.

    Raises:
        TrainingError: A worker failed more often than `ray.max_failures`.
        RunInterrupted: The run was asked to stop.
    """
    import ray.train
    from ray.train.v2.api.exceptions import TrainingFailedError

    from eagleray.platform.trainer import Trainer

    use_gpu = wants_gpu(section)
    trainer = Trainer(
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
        with _ray_train_settings(section):
            summary = stop.call(lambda: trainer.fit().return_value)
    except TrainingFailedError as error:
        if driver_is_gone():
            # This is a trial of a sweep that was killed, and next to be ended: it has lost its workers, not failed.
            os._exit(1)
        raise TrainingError(f"{_reason(error)} Resume with `run.dir={run.folder.place}`.") from error
    except KeyboardInterrupt:
        raise RunInterrupted(run.folder.place, stop.received or signal.SIGINT) from None
    if summary is None:
        raise RunInterrupted(run.folder.place, stop.received or signal.SIGINT)
    return summary


@contextlib.contextmanager
def _ray_train_settings(section: RaySection) -> Iterator[None]:
    """Settings that Ray Train takes from the environment when a run starts; what the user has set stays."""
    import ray

    # A report waits until the controller polls, and so does the end of the run; Ray's default is 2 s. It asks each
    # worker every time, hence less often with many.
    settings = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": f"{max(0.2, section.max_workers / 500):g}",
        # The controller runs in this process, whose logging is ours.
        "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    }
    here = {ray.get_runtime_context().get_node_id()}
    if worker_nodes(section) == here and section.min_workers == section.max_workers:
        # When this machine is taken away, so is the driver: there is nothing to watch for. Further workers of a run
        # that grows may come to nodes that are not there yet.
        settings["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    ours = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


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
