"""Progress of a training run, seen from the driver: step, loss, rate and the time that is left.

The workers write `metrics.jsonl`; a thread here follows that file, so nothing has to be sent between
processes and a run on another machine shows as well. A terminal gets a live bar, a log gets a line from time
to time.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from eagleray.platform.tracking import METRICS_FILE, RECORD_KEYS, parse_records

logger = logging.getLogger(__name__)

_WINDOW = 20
"""Train records over which the rate is taken: smooth, yet soon right after a change of pace."""


@contextmanager
def training_progress(
    run_dir: str | Path,
    total_steps: int,
    description: str,
    *,
    console: Console | None = None,
    poll_s: float = 0.5,
    line_every_s: float = 30.0,
) -> Iterator[TrainingState]:
    """Show the progress of a run while the block lasts.

    Args:
        run_dir: The run folder.
        total_steps: Optimiser steps of the whole run.
        description: What is being trained, in a few words.
        console: Where to show; default: standard error.
        poll_s: Seconds between two looks at the metrics.
        line_every_s: Least seconds between two log lines where there is no terminal.
    """
    console = console or Console(stderr=True)
    state = TrainingState(total_steps)
    follower = MetricsFollower(Path(run_dir) / METRICS_FILE)
    started = time.time()

    def look() -> None:
        # By its time: resuming cuts the file, after which the records of earlier attempts are read once more.
        for record in follower.new_records():
            state.update(record, live=record["time"] >= started)

    look()
    display = (
        _Bar(description, state, console) if console.is_terminal else _Lines(description, state, line_every_s)
    )
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(poll_s):
            look()
            display.show()

    thread = threading.Thread(target=watch, name="training-progress", daemon=True)
    thread.start()
    try:
        yield state
    finally:
        stop.set()
        thread.join()
        look()
        display.close()


class TrainingState:
    """What the metrics say about a run."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self.step = 0
        self.train: dict[str, Any] = {}
        self.eval: dict[str, Any] = {}
        self._recent: deque[tuple[float, int]] = deque(maxlen=_WINDOW)

    def update(self, record: dict[str, Any], *, live: bool) -> None:
        """Take in one record; those of earlier attempts are not `live` and tell nothing about the pace."""
        self.step = record["step"]
        values = {key: value for key, value in record.items() if key not in RECORD_KEYS}
        if record["kind"] == "eval":
            self.eval = values
            return
        self.train = values
        if self._recent and record["step"] <= self._recent[-1][1]:
            self._recent.clear()  # restarted from a checkpoint
        if live:
            self._recent.append((record["time"], record["step"]))

    @property
    def steps_per_second(self) -> float | None:
        """Pace of the last steps, evaluations and checkpoints included; `None` before two records."""
        if len(self._recent) < 2:
            return None
        (start, first), (end, last) = self._recent[0], self._recent[-1]
        return (last - first) / (end - start) if end > start else None

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the pace."""
        pace = self.steps_per_second
        return (self.total_steps - self.step) / pace if pace else None

    def details(self) -> str:
        """Loss, pace and last evaluation, e.g. `loss 0.6931, 2.50 steps/s, eval accuracy 0.713`."""
        parts = [f"loss {self.train['loss']:.4f}"] if self.train.get("loss") is not None else []
        if self.steps_per_second is not None:
            parts.append(f"{self.steps_per_second:.3g} steps/s")
        if self.train.get("tokens_per_s") is not None:
            parts.append(f"{self.train['tokens_per_s']:,.0f} tokens/s")
        shown = [(key, value) for key, value in self.eval.items() if value is not None][:2]
        parts += [f"eval {key} {value:.4g}" for key, value in shown]
        if self.seconds_left:
            parts.append(f"{format_seconds(self.seconds_left)} left")
        return ", ".join(parts)


class MetricsFollower:
    """Reads what was added to a metrics file since the last look, also after it was cut by a restart."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._file_id: int | None = None

    def new_records(self) -> list[dict[str, Any]]:
        """Whole new records; a file that is missing or cannot be read for the moment has none."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._file_id or status.st_size < self._offset:
                    self._file_id, self._offset = status.st_ino, 0
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return list(parse_records(whole.splitlines(), self._path))


class _Bar:
    """A live bar on a terminal."""

    def __init__(self, description: str, state: TrainingState, console: Console) -> None:
        self._state = state
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[details]}"),
            console=console,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task(description, total=state.total_steps, details="starting workers")
        self._progress.start()

    def show(self) -> None:
        details = self._state.details() or "starting workers"
        self._progress.update(self._task, completed=self._state.step, details=details)

    def close(self) -> None:
        self.show()
        self._progress.stop()


class _Lines:
    """A log line every so many seconds, if there is something new."""

    def __init__(self, description: str, state: TrainingState, line_every_s: float) -> None:
        self._description, self._state, self._line_every_s = description, state, line_every_s
        self._next_s, self._shown = 0.0, ""

    def show(self) -> None:
        if time.monotonic() >= self._next_s:
            self._write()

    def close(self) -> None:
        self._write()

    def _write(self) -> None:
        state = self._state
        line = f"{self._description}: step {state.step}/{state.total_steps}, {state.details()}"
        if state.train and line != self._shown:
            logger.info("%s", line)
            self._next_s, self._shown = time.monotonic() + self._line_every_s, line


def format_seconds(seconds: float) -> str:
    """A duration in the two largest units: `45 s`, `3 min 20 s`, `2 h 05 min`, `1 d 03 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"
