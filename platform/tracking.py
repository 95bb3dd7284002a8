"""Metrics of a run: `metrics.jsonl` in the run folder, and beside it TensorBoard, MLflow and Weights & Biases.

Ray Train keeps only metrics that come with a checkpoint, so rank 0 of the workers writes its own. One line is
one object: `{"step": 40, "kind": "train" | "eval", "time": <unix seconds>, ...metrics}`; a value that is not
finite is null. After a restart the lines of steps that are done again are cut away, so that no step is told
twice. Ids of remote runs are kept in the run folder, so that a restarted run goes on in the same place.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Literal, Protocol, Self

import yaml

from eagleray.platform import storage
from eagleray.platform.config import ConfigError, flatten
from eagleray.platform.sections import TrackingSection

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
RECORD_KEYS = ("step", "kind", "time")
"""Keys of a record that are not metrics."""

Kind = Literal["train", "eval"]


class MetricsSink:
    """Where rank 0 of the training workers logs; a context manager, or call `close`.

    Args:
        run_dir: The run folder.
        tracking: Which trackers are told besides the file.
        resume_step: Optimiser steps that the resumed checkpoint has done; 0 for a fresh start.

    Raises:
        ConfigError: A tracker is configured that is not installed or cannot be reached.
    """

    def __init__(self, run_dir: str | Path, tracking: TrackingSection, resume_step: int = 0) -> None:
        run_dir = Path(run_dir)
        self._trackers = _trackers(run_dir, tracking, resume_step)
        cut_metrics(run_dir / METRICS_FILE, resume_step)
        self._file = (run_dir / METRICS_FILE).open("a", encoding="utf-8", buffering=1)

    def log(self, step: int, metrics: Mapping[str, Any], *, kind: Kind = "train") -> None:
        """Record the metrics of one step; values may be one-element tensors."""
        reserved = [key for key in RECORD_KEYS if key in metrics]
        if reserved:
            raise ValueError(
                f"Metrics may not be called {', '.join(RECORD_KEYS)}; given: {', '.join(reserved)}."
            )
        values = {key: float(value) for key, value in metrics.items()}
        record = {"step": step, "kind": kind, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(storage.plain(record), allow_nan=False) + "\n")
        tagged = {f"{kind}/{key}": value for key, value in values.items()}
        for tracker in list(self._trackers):
            try:
                tracker.log(step, tagged)
            except Exception:
                # The file has the metrics; a tracker that cannot be reached must not end a run of days.
                logger.warning("%s gets no more metrics of this run.", type(tracker).__name__, exc_info=True)
                self._trackers.remove(tracker)

    def close(self, *, failed: bool = False) -> None:
        """Flush and close everything; `failed` is told to those trackers that show it."""
        self._file.close()
        for tracker in self._trackers:
            try:
                tracker.close(failed=failed)
            except Exception:
                logger.warning("%s could not be closed.", type(tracker).__name__, exc_info=True)
        self._trackers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All records of a metrics file, without a last line that is only half written; `[]` if there is no file."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    return list(parse_records(lines, path))


def parse_records(lines: Iterable[bytes], path: Path) -> Iterable[dict[str, Any]]:
    """The records among some lines of a metrics file; a broken line is logged and left out."""
    for line in lines:
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or any(key not in record for key in RECORD_KEYS):
                raise ValueError("not a metrics record")
        except ValueError as error:
            logger.debug("%s: a broken line is left out (%s): %r", path, error, line[:80])
            continue
        yield record


def cut_metrics(path: Path, resume_step: int) -> None:
    """Cut a metrics file back to what a run that has done `resume_step` steps had logged.

    With 0 steps done nothing stays: an evaluation at step 0 will be done again.
    """
    if not path.exists():
        return
    kept = [r for r in read_metrics(path) if resume_step > 0 and r["step"] <= resume_step]
    storage.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


class _Tracker(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class _TensorBoard:
    def __init__(self, run_dir: Path, resume_step: int) -> None:
        # torch is heavy, and only workers come here; readers of metrics do not.
        from torch.utils.tensorboard import SummaryWriter

        purge_step = resume_step + 1 if resume_step else 0
        self._writer = SummaryWriter(str(run_dir / "tb"), purge_step=purge_step, flush_secs=10)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _MLflow:
    def __init__(self, run_dir: Path, uri: str) -> None:
        mlflow = _optional("mlflow", "mlflow")
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        ids = _tracker_ids(run_dir)
        if "mlflow" in ids:
            self._run_id = ids["mlflow"]
            self._client.update_run(self._run_id, status="RUNNING")
            return
        config = _config_values(run_dir)
        name = str(config.get("job", "eagleray"))
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._run_id = self._client.create_run(experiment_id, run_name=run_dir.name).info.run_id
        for key, value in config.items():
            # Servers differ in the longest value they take; 500 characters are safe everywhere.
            self._client.log_param(self._run_id, key, str(value)[:500])
        _keep_tracker_id(run_dir, "mlflow", self._run_id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            if math.isfinite(value):
                self._client.log_metric(self._run_id, key, value, step=step)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._run_id, status="FAILED" if failed else "FINISHED")


class _WeightsAndBiases:
    def __init__(self, run_dir: Path, project: str) -> None:
        wandb = _optional("wandb", "wandb")
        run_id = _tracker_ids(run_dir).get("wandb") or uuid.uuid4().hex[:12]
        _keep_tracker_id(run_dir, "wandb", run_id)
        self._run = wandb.init(
            project=project,
            id=run_id,
            name=run_dir.name,
            dir=str(run_dir),
            resume="allow",
            config=_config_values(run_dir),
        )
        # wandb's own step only grows, and would drop the steps that a restarted run does again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _trackers(run_dir: Path, tracking: TrackingSection, resume_step: int) -> list[_Tracker]:
    trackers: list[_Tracker] = []
    if tracking.mlflow is not None:
        trackers.append(_reach("mlflow", tracking.mlflow, lambda uri: _MLflow(run_dir, uri)))
    if tracking.wandb is not None:
        trackers.append(_reach("wandb", tracking.wandb, lambda project: _WeightsAndBiases(run_dir, project)))
    if tracking.tensorboard:
        trackers.append(_TensorBoard(run_dir, resume_step))
    return trackers


def _reach(key: str, target: str, connect: Callable[[str], _Tracker]) -> _Tracker:
    """Connect to a tracker; at the start of a run, a wrong address is better refused than lost in a log."""
    try:
        return connect(target)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"`tracking.{key}` is {target!r}, which does not work: {error} Correct it, or set `tracking.{key}=null`."
        ) from error


def _optional(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f"`tracking.{extra}` is set, but {module} is not installed on this machine. Install it with "
            f"`pip install 'eagleray[{extra}]'`, or set `tracking.{extra}=null`."
        ) from None


def _config_values(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "config.yaml"
    return flatten(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _tracker_ids(run_dir: Path) -> dict[str, str]:
    path = run_dir / "tracking.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _keep_tracker_id(run_dir: Path, tracker: str, run_id: str) -> None:
    storage.write_json(run_dir / "tracking.json", {**_tracker_ids(run_dir), tracker: run_id})
