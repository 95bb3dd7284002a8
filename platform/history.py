"""Reading run folders back: listing, showing and comparing runs. Nothing else is a database."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eagleray.platform import storage
from eagleray.platform.config import ConfigError, flatten
from eagleray.platform.runs import CONFIG_FILE, MANIFEST_FILE, REPORT_FILE
from eagleray.platform.tracking import METRICS_FILE, RECORD_KEYS, read_metrics

logger = logging.getLogger(__name__)

_NOT_RUNS = {"tb", "model", "checkpoints", "plots", "data", "ray"}
"""Subfolders of a run in which no other run is looked for."""


@dataclass(frozen=True)
class RunRecord:
    """A run folder as read from disk."""

    path: Path
    manifest: dict[str, Any]
    config: dict[str, Any]
    report: dict[str, Any] | None

    @property
    def status(self) -> str:
        """The status in the manifest; `killed` if it says `running` and no process holds the folder."""
        status = str(self.manifest.get("status", "unreadable"))
        return "killed" if status == "running" and not storage.is_locked(self.path) else status

    def final_metrics(self) -> dict[str, Any]:
        """Dotted name and value of the report's entries; without a report, the last value of each eval metric."""
        if self.report is not None:
            return flatten(self.report)
        last: dict[str, Any] = {}
        for record in read_metrics(self.path / METRICS_FILE):
            if record["kind"] == "eval":
                last.update((key, value) for key, value in record.items() if key not in RECORD_KEYS)
        return last


@dataclass(frozen=True)
class RunComparison:
    """Runs side by side: each mapping goes from a dotted key to one value a run, `None` where it has none."""

    names: list[str]
    config: dict[str, list[Any]]
    metrics: dict[str, list[Any]]


def load_run(path: str | Path) -> RunRecord:
    """Read a run folder.

    Raises:
        ConfigError: The folder is missing, is not a run folder or cannot be read.
    """
    path = Path(path).expanduser()
    if not (path / MANIFEST_FILE).is_file():
        raise ConfigError(
            f"{path} is not a run folder: it holds no {MANIFEST_FILE}. `eagleray runs list` finds runs."
        )
    report = path / REPORT_FILE
    config = path / CONFIG_FILE
    return RunRecord(
        path=path,
        manifest=storage.read_json(path / MANIFEST_FILE),
        config=yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {},
        report=storage.read_json(report) if report.is_file() else None,
    )


def list_runs(root: str | Path) -> list[RunRecord]:
    """All runs below a folder, oldest first; a run folder that cannot be read is listed with that status."""
    runs = []
    for folder, subfolders, files in os.walk(Path(root).expanduser()):
        subfolders[:] = [name for name in subfolders if name not in _NOT_RUNS and not name.startswith(".")]
        if MANIFEST_FILE in files:
            try:
                runs.append(load_run(folder))
            except (ValueError, OSError, yaml.YAMLError) as error:
                logger.warning("%s", error)
                runs.append(RunRecord(Path(folder), {}, {}, None))
    return sorted(runs, key=lambda run: (run.manifest.get("created", ""), run.path))


def compare_runs(paths: Sequence[str | Path]) -> RunComparison:
    """Config keys in which the runs differ, and the final metrics of all of them."""
    runs = [load_run(path) for path in paths]
    configs = [flatten({k: v for k, v in run.config.items() if k != "run"}) for run in runs]
    metrics = [run.final_metrics() for run in runs]
    config_rows = _rows(configs)
    return RunComparison(
        names=short_names([run.path for run in runs]),
        config={key: row for key, row in config_rows.items() if any(value != row[0] for value in row)},
        metrics=_rows(metrics),
    )


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many of the last parts as it takes to tell the paths apart."""
    parts = [path.absolute().parts for path in paths]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(path) for path in paths]


def _rows(columns: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    keys = {key: None for column in columns for key in column}
    return {key: [column.get(key) for column in columns] for key in keys}
