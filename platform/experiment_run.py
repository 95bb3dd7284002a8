"""Running the stages of an experiment: each in a process of its own, side by side as far as cores and GPUs allow.

A stage that fails takes with it only what depends on it. A stage that another process is at work on, e.g. one that a
killed experiment left behind, is waited for. A signal is handed on to the stages, which save a checkpoint and stop.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from eagleray.platform import storage
from eagleray.platform.experiment import Stage
from eagleray.platform.progress import format_seconds
from eagleray.platform.runs import RunInterrupted

logger = logging.getLogger(__name__)

Status = Literal["done", "finished", "failed", "skipped"]
_POLL_S = 0.1


@dataclass(frozen=True)
class Need:
    """What a stage takes while it runs, or what there is for all of them."""

    cpus: float = 1
    gpus: int = 0

    def __str__(self) -> str:
        return f"{self.cpus:g} core(s)" + (f" and {self.gpus} GPU(s)" if self.gpus else "")


@dataclass(frozen=True)
class Outcome:
    """How a stage ended; `done`: it had been run before."""

    status: Status
    error: str = ""


def startable(
    waiting: Sequence[Stage],
    ended: Mapping[str, Any],
    running: Sequence[Need],
    needs: Mapping[str, Need],
    have: Need,
) -> list[Stage]:
    """The stages that can start now, in order: all they need has ended, and they fit beside what runs."""
    cpus, gpus = sum(need.cpus for need in running), sum(need.gpus for need in running)
    chosen: list[Stage] = []
    for stage in waiting:
        need = needs[stage.name]
        fits = cpus + need.cpus <= have.cpus and gpus + need.gpus <= have.gpus
        if all(name in ended for name in stage.needs) and (fits or not (running or chosen)):
            chosen.append(stage)
            cpus, gpus = cpus + need.cpus, gpus + need.gpus
    return chosen


def makespan(
    stages: Sequence[Stage], seconds: Mapping[str, float], needs: Mapping[str, Need], have: Need
) -> float:
    """Seconds from start to end if the stages take `seconds` each; one that is not in it takes none."""
    now, ended, running = 0.0, {s.name for s in stages if s.name not in seconds}, dict[str, float]()
    waiting = [stage for stage in stages if stage.name in seconds]
    while waiting or running:
        known = dict.fromkeys(ended)
        for stage in startable(waiting, known, [needs[name] for name in running], needs, have):
            running[stage.name] = now + seconds[stage.name]
            waiting.remove(stage)
        name = min(running, key=running.__getitem__)
        now = running.pop(name)
        ended.add(name)
    return now


def run_stages(
    stages: Sequence[Stage],
    root: Path,
    launcher: Sequence[str],
    needs: Mapping[str, Need],
    have: Need,
    *,
    assign_gpus: bool,
) -> dict[str, Outcome]:
    """Run what is not done.

    Args:
        stages: In an order in which they can run.
        root: The experiment's folder; gets `configs/` and `logs/`.
        launcher: Command that runs a job when the path of its config is put behind it.
        needs: Of each stage that is not done.
        have: What there is for all of them.
        assign_gpus: Give each process GPUs of its own by `CUDA_VISIBLE_DEVICES`; on a cluster Ray does that.

    Raises:
        RunInterrupted: A signal came; the stages have stopped.
    """
    run = _Running(root, launcher, needs, have, list(range(have.gpus)) if assign_gpus else None)
    run.ended |= {stage.name: Outcome("done") for stage in stages if stage.state == "done"}
    waiting, ended = [stage for stage in stages if stage.name not in run.ended], run.ended
    with _signals() as received:
        while waiting or run.active:
            for stage in [s for s in waiting if any(_is_lost(ended.get(name)) for name in s.needs)]:
                waiting.remove(stage)
                lost = ", ".join(name for name in stage.needs if _is_lost(ended.get(name)))
                ended[stage.name] = Outcome("skipped", f"needs {lost}")
            if received:
                run.forward(received)
                waiting = []
            for stage in startable(waiting, ended, run.used, needs, have):
                waiting.remove(stage)
                run.start(stage)
            run.collect()
            time.sleep(_POLL_S if run.active else 0)
    if received:
        raise RunInterrupted(root, received[0])
    return ended


@dataclass
class _Running:
    """Stages at work."""

    root: Path
    launcher: Sequence[str]
    needs: Mapping[str, Need]
    have: Need
    free_gpus: list[int] | None
    active: dict[str, _Active] = field(default_factory=dict)
    ended: dict[str, Outcome] = field(default_factory=dict)
    forwarded: int = 0

    @property
    def used(self) -> list[Need]:
        return [self.needs[name] for name in self.active]

    def start(self, stage: Stage) -> None:
        missing = [path for path in stage.reads if not path.exists()]
        if missing:
            left = sorted(path.name for path in missing[0].parent.glob("*")) or ["nothing"]
            reason = f"{missing[0]} is not there; {missing[0].parent} holds {', '.join(left)}"
            self.ended[stage.name] = Outcome("failed", reason)
            logger.error("%s: %s.", stage.name, reason)
            return
        state = stage.state
        if state == "done":  # by another process, a moment ago
            self.ended[stage.name] = Outcome("done")
            return
        if state == "running":
            logger.info("%s: another process is at work on it; waiting.", stage.name)
            self.active[stage.name] = _Active(stage, None, [], time.monotonic())
            return
        resumed = "resumed" if state == "begun" else "started"
        logger.info("%s: %s with %s; log: %s", stage.name, resumed, self.needs[stage.name], self._log(stage))
        gpus = [] if self.free_gpus is None else self.free_gpus[: self.needs[stage.name].gpus]
        if self.free_gpus is not None:
            self.free_gpus = self.free_gpus[len(gpus) :]
        with self._log(stage).open("ab") as log:
            process = subprocess.Popen(
                [*self.launcher, str(self._config(stage))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(stage, gpus),
                start_new_session=True,  # a Ctrl-C of the terminal reaches us alone, and we hand it on once
            )
        self.active[stage.name] = _Active(stage, process, gpus, time.monotonic())

    def collect(self) -> None:
        for name, active in list(self.active.items()):
            if not active.has_ended():
                continue
            del self.active[name]
            if self.free_gpus is not None:
                self.free_gpus += active.gpus
            took = format_seconds(time.monotonic() - active.since)
            if active.stage.state == "done":
                self.ended[name] = Outcome("finished")
                logger.info("%s: finished in %s.", name, took)
            else:
                self.ended[name] = Outcome("failed", self._reason(active.stage))
                if not self.forwarded:
                    logger.error("%s: failed after %s: %s", name, took, self.ended[name].error)

    def forward(self, received: Sequence[signal.Signals]) -> None:
        """Hand signals on that have not been handed on yet."""
        for number in received[self.forwarded :]:
            for active in self.active.values():
                if active.process is not None:
                    active.process.send_signal(number)
        if not self.forwarded:
            logger.warning("%s: the stages save what they have and stop.", received[0].name)
            # What others run is theirs to stop.
            self.active = {k: active for k, active in self.active.items() if active.process is not None}
        self.forwarded = len(received)

    def _config(self, stage: Stage) -> Path:
        path = self._place("configs", stage, "yaml")
        text = yaml.safe_dump({"job": stage.job, **stage.values}, sort_keys=False, allow_unicode=True)
        storage.write_text(path, text)
        return path

    def _log(self, stage: Stage) -> Path:
        return self._place("logs", stage, "log")

    def _place(self, folder: str, stage: Stage, suffix: str) -> Path:
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        return self.root / folder / f"{stage.folder.name}.{suffix}"

    def _environment(self, stage: Stage, gpus: Sequence[int]) -> dict[str, str]:
        threads = str(max(1, int(self.needs[stage.name].cpus)))
        given = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} if self.free_gpus is not None else {}
        return {"OMP_NUM_THREADS": threads, **os.environ, **given}

    def _reason(self, stage: Stage) -> str:
        error = stage.manifest.get("attempts", [{}])[-1].get("error")
        if error:
            return str(error).splitlines()[0]
        log = self._log(stage)
        lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "it left no message")


@dataclass(frozen=True)
class _Active:
    stage: Stage
    process: subprocess.Popen[bytes] | None
    """None: a process that is not ours."""
    gpus: list[int]
    since: float

    def has_ended(self) -> bool:
        if self.process is None:
            return self.stage.state != "running"
        return self.process.poll() is not None


def _is_lost(outcome: Outcome | None) -> bool:
    return outcome is not None and outcome.status in ("failed", "skipped")


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collects SIGINT and SIGTERM in place of acting on them."""
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    handler: Callable[..., None] = lambda number, _: received.append(signal.Signals(number))
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)
