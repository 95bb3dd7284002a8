"""What the `eagleray` command prints about configs and runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eagleray.jobs.launch import resume_command
from eagleray.platform.config import Config
from eagleray.platform.history import RunComparison, RunRecord
from eagleray.platform.progress import format_seconds
from eagleray.platform.storage import plain

_STATUS_COLOURS = {
    "finished": "green",
    "running": "cyan",
    "failed": "red",
    "interrupted": "yellow",
    "killed": "red",
    "stopped": "yellow",
}
_PIPE_WIDTH = 200
"""Columns where there is no terminal to ask: cutting a table for a file or `grep` helps nobody."""


@dataclass(frozen=True)
class ConfigRow:
    """One key of a resolved config."""

    key: str
    value: Any
    source: Literal["default", "file", "override"]
    description: str


def config_rows(cfg: Config, *, overridden: Sequence[str], prefix: str = "") -> Iterator[ConfigRow]:
    """Every key of a config that holds a value, in declaration order; sections and lists of them are entered.

    Args:
        cfg: The resolved config.
        overridden: Keys set on the command line; what lies under them counts too.
        prefix: Dotted key of `cfg` itself, with a dot at the end.
    """
    for name, field in type(cfg).model_fields.items():
        key, value = f"{prefix}{name}", getattr(cfg, name)
        if isinstance(value, Config):
            yield from config_rows(value, overridden=overridden, prefix=f"{key}.")
        elif isinstance(value, list | tuple) and value and all(isinstance(item, Config) for item in value):
            for index, item in enumerate(value):
                yield from config_rows(item, overridden=overridden, prefix=f"{key}.{index}.")
        else:
            yield ConfigRow(key, value, _source(cfg, name, key, overridden), field.description or "")


def print_config(rows: Iterable[ConfigRow]) -> None:
    """A table of keys; what is not a default stands out."""
    table = _table("Key", "Value", "From", "Description")
    for row in rows:
        style = "" if row.source == "default" else "bold"
        table.add_row(
            Text(row.key, style),
            Text(_shown(row.value), style),
            Text(row.source, style),
            Text(row.description),
        )
    console().print(table)


def print_run_list(runs: Sequence[RunRecord], root: Path) -> None:
    """One line a run."""
    if not runs:
        console().print(Text(f"No runs in {root}."))
        return
    table = _table("Run", "Job", "Status", "Created (UTC)", "Time", "Note")
    for run in runs:
        values = run.manifest
        table.add_row(
            Text(os.path.relpath(run.path)),
            Text(values.get("job", "")),
            _status(run.status),
            Text(_moment(values.get("created"))),
            Text(_duration(values.get("wall_seconds"))),
            Text(values.get("note", "")),
        )
    console().print(table)


def print_run(run: RunRecord) -> None:
    """The manifest in words, the final metrics, and what to do next."""
    out, values = console(), run.manifest
    git = values.get("git") or {}
    hardware = values.get("hardware", {})
    facts = {
        "Run": str(run.path),
        "Job": values.get("job"),
        "Note": values.get("note"),
        "Command": values.get("command"),
        "Created": _moment(values.get("created")),
        "Time": _duration(values.get("wall_seconds")),
        "Attempts": len(values.get("attempts", [])),
        "Code": f"eagleray {values.get('eagleray')}, " + _commit(git),
        "Python": f"{values.get('python')} on {values.get('platform')}",
        "Packages": ", ".join(f"{name} {version}" for name, version in values.get("packages", {}).items()),
        "Hardware": ", ".join(
            [f"{hardware.get('cpus')} CPUs", f"{hardware.get('memory_gib')} GiB", *hardware.get("gpus", [])]
        ),
        "Seeds": ", ".join(f"{key}={seed}" for key, seed in values.get("seeds", {}).items()),
        "Data": ", ".join(
            f"{path} ({str(digest)[:12]})" for path, digest in values.get("data_hashes", {}).items()
        ),
    }
    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text("Status", "bold"), _status(run.status))
    for label, fact in facts.items():
        if fact:
            grid.add_row(Text(label, "bold"), Text(str(fact)))
    out.print(grid)
    metrics = run.final_metrics()
    if metrics:
        table = _table("Metric", "Value")
        for key, value in metrics.items():
            table.add_row(Text(key), Text(_shown(value)))
        out.print(table)
    if run.status in ("failed", "interrupted", "killed"):
        error = values["attempts"][-1].get("error")
        if error:
            out.print(Text(error, "red"))
        out.print(Text(f"Resume: {resume_command(str(run.path.absolute()))}"), soft_wrap=True)


def print_comparison(comparison: RunComparison) -> None:
    """Differing keys above, metrics below; one column a run."""
    table = _table("", *comparison.names)
    for title, rows in (("config", comparison.config), ("metrics", comparison.metrics)):
        if rows:
            table.add_row(Text(title, "bold italic"))
            for key, row in rows.items():
                table.add_row(Text(key), *(Text(_shown(value)) for value in row))
            table.add_section()
    console().print(table)


def _source(
    cfg: Config, name: str, key: str, overridden: Sequence[str]
) -> Literal["default", "file", "override"]:
    if name not in cfg.model_fields_set:
        return "default"
    return "override" if any(key == o or key.startswith(f"{o}.") for o in overridden) else "file"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) and value else json.dumps(plain(value), ensure_ascii=False)


def _commit(git: dict[str, Any]) -> str:
    if not git:
        return "not from a git checkout"
    return f"commit {git['commit'][:12]}" + (" with uncommitted changes" if git.get("dirty") else "")


def _moment(text: str | None) -> str:
    return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M") if text else ""


def _duration(seconds: float | None) -> str:
    return format_seconds(seconds) if seconds else ""


def _status(status: str) -> Text:
    return Text(status, _STATUS_COLOURS.get(status, ""))


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    return table


def console() -> Console:
    """Where tables go."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
