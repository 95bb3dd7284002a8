"""The run folder: what a run was asked, on what it ran and how it ended.

`config.yaml` and `manifest.json` exist before anything runs. A folder that holds a config is resumed, and only
with the config it was started with: silently going on with another one is how results become untrue.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shlex
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from eagleray.platform import storage
from eagleray.platform.config import ConfigError, config_hash, diff_configs, flatten, to_yaml
from eagleray.platform.environment import describe_environment, in_submitted_job
from eagleray.platform.lease import Lease
from eagleray.platform.remote import (
    WORKERS_PARTS,
    RemoteFolder,
    SharedFolder,
    TransferError,
    is_uri,
    open_folder,
)
from eagleray.platform.sections import JobConfig, RunSection
from eagleray.platform.tracking import METRICS_FILE

logger = logging.getLogger(__name__)

Status = Literal["created", "running", "finished", "failed", "interrupted", "stopped"]

FREE_ON_RESUME = {
    "run": "where a run is recorded, and under which note, does not change it",
    "tracking": "nor does who else is told about its metrics",
    "ray.address": "a run may go on on another cluster",
    "ray.max_failures": "a run may be given more patience",
    "ray.num_workers": "the global batch stays; how it is split changes only rounding and dropout",
    "ray.resize_every_s": "nor does how often workers may be added",
    "train.micro_batch_size": "so that the batch can be split over more workers",
}
"""Keys that may differ between the attempts of one run, each with the reason."""

CONFIG_FILE, MANIFEST_FILE, REPORT_FILE = "config.yaml", "manifest.json", "report.json"

_PROGRESS = (METRICS_FILE, REPORT_FILE, "candidates", "checkpoints", "model", "scores", "trials")


class RunFinishedError(ConfigError):
    """The run in the folder has finished; there is nothing to resume."""

    def __init__(self, place: str) -> None:
        results = f"{place}/{REPORT_FILE} holds" if is_uri(place) else f"`eagleray runs show {place}` prints"
        super().__init__(
            f"{place}: this run has finished; {results} its results. Set another `run.dir`, or none, for a new run."
        )
        self.place = place


class RunInterrupted(KeyboardInterrupt):
    """The run was stopped by Ctrl-C, a termination signal or a request in its folder, and can be resumed."""

    def __init__(self, place: str | Path, number: signal.Signals = signal.SIGINT) -> None:
        super().__init__(f"interrupted: {place}")
        self.place = str(place)
        self.signal = number


def manifest_at(place: str) -> dict[str, Any]:
    """Manifest of a run, at a path or URI, as all nodes see it; empty if there is none.

    Raises:
        DamagedFileError: It is no JSON.
    """
    try:
        return json.loads(open_folder(place).read_text(MANIFEST_FILE))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise storage.DamagedFileError(f"{place}/{MANIFEST_FILE} is damaged: {error}") from None


class RunFolder:
    """Paths of a run folder and, in the driver that holds its lock, the writing of its records."""

    def __init__(self, place: str | Path) -> None:
        place = str(place)
        self.folder = open_folder(place if is_uri(place) else str(Path(place).expanduser().absolute()))
        """Where the run is kept; at a URI, `path` is a working copy."""
        self.path = self.folder.path
        self.resumed = False
        """Whether earlier attempts left something to go on from."""
        self._lock = storage.FolderLock(self.path)
        self._lease = Lease(self.folder) if isinstance(self.folder, RemoteFolder) else None
        self._others_send: tuple[str, ...] = ()

    @classmethod
    def create(cls, job: str, cfg: JobConfig, *, shared: bool = False) -> RunFolder:
        """Make a new run folder, or open the existing one that `run.dir` names to resume its run.

        The folder stays locked for this process until `recording` ends or `close` is called.

        Args:
            job: Name of the job.
            cfg: Its config.
            shared: Whether other processes write into the folder, so that it must be one that all nodes see.

        Raises:
            RunFinishedError: The run in the folder has finished.
            ConfigError: The folder cannot be written or is in use, or holds another job, another config or
                files that are not a run.
        """
        place = _choose_place(job, cfg.run)
        if shared and is_uri(place):
            raise ConfigError(
                f"The run folder is {place}; the parts of a run of `{job}` are written by several processes, which "
                "need a path on a local or shared file system, e.g. /mnt/shared/runs/first."
            )
        try:
            run = cls(place)
            run.path.mkdir(parents=True, exist_ok=True)
            _refuse_foreign_files(run.folder)
            run._lock.acquire()
            try:
                run._check_out()
                run._open(job, cfg)
            except BaseException:
                run.close()
                raise
        except storage.LockHeldError as error:
            raise ConfigError(f"{error} Wait for it to end, or set another `run.dir`.") from None
        except OSError as error:
            raise ConfigError(
                f"{place}: the run folder cannot be written ({error.strerror or error}). Set `run.dir` or `run.root` "
                "to a folder that you may write to, on a disk with free space."
            ) from None
        return run

    def close(self) -> None:
        """Give up the lock."""
        if self._lease is not None:
            self._lease.release()
        self._lock.release()

    def leave_to_workers(self) -> None:
        """From now on, training workers send what they write themselves, if the folder is at a URI."""
        self._others_send = ("checkpoints", "data", *WORKERS_PARTS)

    def _check_out(self) -> None:
        if isinstance(self.folder, RemoteFolder):
            self.folder.probe()
            assert self._lease is not None
            self._lease.acquire()
            self.folder.check_out()

    def _check_in(self) -> None:
        if not isinstance(self.folder, RemoteFolder):
            return
        try:
            self.folder.check_in(but=self._others_send)
        except OSError as problem:
            raise TransferError(
                f"What the run wrote could not be sent ({problem}); it lies in {self.path} of {socket.gethostname()}. "
                "Resume the run when the place can be reached."
            ) from problem

    @property
    def config(self) -> Path:
        return self.path / CONFIG_FILE

    @property
    def manifest(self) -> Path:
        return self.path / MANIFEST_FILE

    @property
    def metrics(self) -> Path:
        return self.path / METRICS_FILE

    @property
    def report(self) -> Path:
        return self.path / REPORT_FILE

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def data(self) -> Path:
        return self.path / "data"

    def read_manifest(self) -> dict[str, Any]:
        """The manifest as it stands."""
        return storage.read_json(self.manifest)

    def fetch_records(self) -> RunFolder:
        """Have config, manifest, metrics and report here as they are at the URI, of a run that nobody works on."""
        self.folder.receive(CONFIG_FILE, MANIFEST_FILE, METRICS_FILE, REPORT_FILE)
        return self

    def update_manifest(self, **fields: Any) -> None:
        """Set fields of the manifest; mappings such as `data_hashes` are merged into what is there."""
        values = self.read_manifest()
        for key, value in fields.items():
            old = values.get(key)
            values[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, Mapping) else value
        self._write_manifest(values)

    def write_report(self, report: Mapping[str, Any]) -> None:
        """Write the final metrics; numbers may be tensors or arrays."""
        storage.write_json(self.report, report)

    @contextmanager
    def recording(self) -> Iterator[RunFolder]:
        """Record status, time and the error, if any, of what runs inside; the lock is given back at the end.

        Raises:
            RunInterrupted: In place of a `KeyboardInterrupt`, and of the `SystemExit` by which Ray answers
                termination signals.
        """
        start = time.monotonic()
        self._record("running")
        try:
            yield self
            self._check_in()  # before the status: who reads "finished" must find the results
        except (KeyboardInterrupt, SystemExit) as stop:
            self._record_end("interrupted", start)
            if isinstance(stop, RunInterrupted):
                raise
            number = signal.SIGTERM if isinstance(stop, SystemExit) else signal.SIGINT
            raise RunInterrupted(self.folder.place, number) from stop
        except BaseException as error:
            self._record_end("failed", start, error)
            error.add_note(f"Run folder: {self.folder.place}")
            raise
        else:
            self._record_end("finished", start)
        finally:
            self.close()

    def _open(self, job: str, cfg: JobConfig) -> None:
        old = self.read_manifest() if self.manifest.exists() else {}
        if self.config.exists():
            self._check_resumable(job, cfg, old)
        now, command, environment = _now(), shlex.join(sys.argv), describe_environment()
        attempt = {
            "started": now,
            "status": "created",
            "command": command,
            "cwd": os.getcwd(),
            "process": os.getpid(),
            **{key: environment[key] for key in ("host", "eagleray", "git")},
        }
        attempts = [
            {**a, "status": "killed"} if a["status"] in ("created", "running") else a
            for a in old.get("attempts", [])
        ]
        values = {
            "job": job,
            "status": "created",
            "note": cfg.run.note,
            "command": command,
            "created": old.get("created", now),
            "started": old.get("started"),
            "ended": None,
            "wall_seconds": old.get("wall_seconds", 0.0),
            "config_hash": _experiment_hash(cfg),
            "seeds": {k: v for k, v in flatten(cfg.model_dump()).items() if k.split(".")[-1] == "seed"},
            "data_hashes": old.get("data_hashes", {}) if self.resumed else {},
            **environment,
            "attempts": [*attempts, attempt],
        }
        # The config last: a folder counts as a run from then on.
        self._write_manifest(values)
        storage.write_text(self.config, to_yaml(cfg))
        self.folder.send(CONFIG_FILE)
        logger.info("Run folder: %s%s", self.folder.place, " (resumed)" if self.resumed else "")

    def _check_resumable(self, job: str, cfg: JobConfig, old: dict[str, Any]) -> None:
        if old.get("job", job) != job:
            raise ConfigError(
                f"{self.folder.place} holds a run of `{old['job']}`, not of `{job}`. Set another `run.dir`."
            )
        if old.get("status") != "finished" and not self._has_progress():
            # Nothing is lost by a changed config here; typically the first attempt failed over a typing error.
            return
        before = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        changes = diff_configs(before, cfg.model_dump(mode="json"), ignore=tuple(FREE_ON_RESUME))
        if changes:
            lines = "\n".join(f"  - {key}: {was!r} -> {now!r}" for key, (was, now) in changes.items())
            raise ConfigError(
                f"{self.folder.place} holds a run with another config:\n{lines}\n"
                "Take the old values to resume it, or set another `run.dir` for a new run."
            )
        if old.get("config_hash") != _experiment_hash(cfg):
            raise ConfigError(
                f"{self.folder.place}/{CONFIG_FILE} was edited after the run had started, so the run cannot be resumed "
                "truthfully. Undo the edit, or set another `run.dir` for a new run."
            )
        if old.get("status") == "finished":
            raise RunFinishedError(self.folder.place)
        self.resumed = True

    def _has_progress(self) -> bool:
        """Whether an earlier attempt got as far as leaving a metric, a checkpoint, a model, scores, a report or a trial."""
        for name in _PROGRESS:
            path = self.path / name
            if any(path.iterdir()) if path.is_dir() else path.is_file() and path.stat().st_size:
                return True
        # At a URI these are not in the working copy.
        return isinstance(self.folder, RemoteFolder) and not {"trials", "scores"}.isdisjoint(
            self.folder.names()
        )

    def _record(self, status: Status, **attempt_fields: Any) -> None:
        values = self.read_manifest()
        values["status"] = status
        values["started"] = values["started"] or _now()
        values["attempts"][-1].update(status=status, **attempt_fields)
        if "ended" in attempt_fields:
            values["ended"] = attempt_fields["ended"]
            values["wall_seconds"] = round(sum(a.get("wall_seconds", 0.0) for a in values["attempts"]), 2)
        self._write_manifest(values)

    def _write_manifest(self, values: dict[str, Any]) -> None:
        storage.write_json(self.manifest, values)
        self.folder.send(MANIFEST_FILE)

    def _record_end(self, status: Status, start: float, error: BaseException | None = None) -> None:
        fields: dict[str, Any] = {"ended": _now(), "wall_seconds": round(time.monotonic() - start, 2)}
        if error is not None:
            fields["error"] = f"{type(error).__name__}: {error}"
            fields["traceback"] = "".join(traceback.format_exception(error))
        try:
            if status != "finished":
                self._check_in()
            self._record(status, **fields)
        except OSError as problem:
            # A full disk must not replace the error that matters.
            logger.warning("%s: the end of the run could not be recorded: %s", self.manifest, problem)


def _choose_place(job: str, section: RunSection) -> str:
    place = section.dir if section.dir is not None else run_place(section.root, job, new_run_name())
    if is_uri(place):
        return place
    path = Path(place)
    if in_submitted_job() and not path.expanduser().is_absolute():
        # Here a relative path would mean Ray's copy of the working tree, which Ray deletes.
        path = Path.home() / path
        logger.warning(
            "`run.%s` is relative, and a submitted job's own folder does not last: the run is recorded under the "
            "home folder of this node, in %s. Set an absolute path on storage that all nodes share.",
            "root" if section.dir is None else "dir",
            path,
        )
    return str(path)


def run_place(root: str, job: str, name: str) -> str:
    """The run folder of a new run: a path or, if `root` is one, a URI."""
    return f"{root.rstrip('/')}/{job}/{name}" if is_uri(root) else str(Path(root) / job / name)


def new_run_name() -> str:
    """Name of a new run folder: the time, and a few letters in case two start at once."""
    return f"{datetime.now(UTC).strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def _experiment_hash(cfg: JobConfig) -> str:
    return config_hash(cfg, exclude=tuple(FREE_ON_RESUME))


def _refuse_foreign_files(folder: SharedFolder) -> None:
    """`run.dir=.` would otherwise spread a run over somebody's project."""
    names = folder.names()
    foreign = [n for n in names if not n.startswith(".") and n not in (MANIFEST_FILE, "data")]
    if foreign and CONFIG_FILE not in names:
        raise ConfigError(
            f"{folder.place} is not a run folder: it holds `{min(foreign)}`{' and more' if len(foreign) > 1 else ''} but no "
            f"{CONFIG_FILE}. Set `run.dir` to a new or empty folder."
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
