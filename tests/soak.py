"""Many kills at random steps of one run, which must end bit-identical to an undisturbed one.

    make soak [KILLS=20] [SEED=0]

Killed by SIGKILL, in random order: one worker, all workers, the driver (started again with the same `run.dir`).
Prints a table of what was killed when and from which step the run went on.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table
from toy_task import assert_identical, toy_command, train_undisturbed

from eagleray.platform.tracking import read_metrics

KINDS = ("one worker", "all workers", "driver")
GAP = 12  # steps between two kills: at least this many, at most twice as many


@dataclass
class Kill:
    """One kill and what came of it."""

    kind: str
    step: int  # the last one that was logged
    resumed_at: int  # the lowest seen since: what came after the checkpoint is done again


class Soak:
    """One run that is killed again and again."""

    def __init__(self, folder: Path, kills: int, seed: int) -> None:
        self.folder, self.random, self.wanted = folder, random.Random(seed), kills
        self.settings = [
            f"train.max_steps={2 * GAP * (kills + 1)}",
            f"train.eval_every={GAP // 2}",
            "train.micro_batch_size=4",
            "dropout=0.2",
            "pause_s=0.02",
            "ray.num_workers=2",
            "ray.max_failures=-1",
        ]
        self.kills: list[Kill] = []

    def run(self) -> None:
        """Disturb the run until it has had its kills, and let it end."""
        while True:
            driver = self._start()
            while len(self.kills) < self.wanted and self._alive_at(driver, self._next()):
                self._kill(driver, self.random.choice(KINDS))
            self._alive_at(driver, None)
            if driver.wait() == 0:
                return
            if driver.returncode > 0:
                sys.exit(f"The driver ended with exit code {driver.returncode}; see {self.folder / 'log'}.")

    def check(self) -> None:
        """Compare with an undisturbed run; raises if anything differs."""
        train_undisturbed(self.folder / "whole", *self.settings, workers=2)
        assert_identical(self.folder / "run", self.folder / "whole")

    def _start(self) -> subprocess.Popen[bytes]:
        command, environment = toy_command(self.folder / "run", *self.settings)
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def _next(self) -> int:
        return self._step() + self.random.randint(GAP, 2 * GAP)

    def _alive_at(self, driver: subprocess.Popen[bytes], step: int | None) -> bool:
        """Wait for a step (none: for the end); False if the driver ends before."""
        while driver.poll() is None:
            reached = self._step()
            if self.kills:
                self.kills[-1].resumed_at = min(self.kills[-1].resumed_at, reached)
            if step is not None and reached >= step:
                return True
            time.sleep(0.01)
        return False

    def _kill(self, driver: subprocess.Popen[bytes], kind: str) -> None:
        workers = _workers(driver)
        victims = {"one worker": workers[:1], "all workers": workers, "driver": [psutil.Process(driver.pid)]}
        if not victims[kind]:
            return
        for process in victims[kind]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if kind == "driver":  # its workers take a few more steps, until they notice
            psutil.wait_procs(workers, timeout=60)
        self.kills.append(Kill(kind, self._step(), self._step()))

    def _step(self) -> int:
        records = read_metrics(self.folder / "run" / "metrics.jsonl")
        return records[-1]["step"] if records else 0


def _workers(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def main() -> None:
    """Run, compare, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    soak, started = Soak(folder, options.kills, options.seed), time.monotonic()
    soak.run()
    seconds = time.monotonic() - started
    table = Table(title=f"{len(soak.kills)} kills in {seconds:.0f} s, seed {options.seed}")
    for column in ("#", "killed", "at step", "went on from step"):
        table.add_column(column, justify="left" if column == "killed" else "right")
    for number, kill in enumerate(soak.kills, 1):
        table.add_row(str(number), kill.kind, str(kill.step), str(kill.resumed_at))
    Console().print(table)
    soak.check()
    print(f"Bit-identical to an undisturbed run: metrics, order of samples and weights ({folder}).")


if __name__ == "__main__":
    main()
