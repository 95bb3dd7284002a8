"""One trial of a sweep: an ordinary training run, started from a process that does nothing else."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eagleray.platform import storage
from eagleray.platform.remote import open_folder
from eagleray.platform.runs import RunFolder, manifest_at
from eagleray.platform.space import SweepPlan, trial_config


def trials_of(run: RunFolder) -> str:
    """Where the run folders of a sweep's trials lie, a path or URI."""
    return f"{run.folder.place}/trials"


def start_trial(
    plan: SweepPlan, place: str, point: Mapping[str, Any], *, working_dir: Path, note: str, **options: Any
) -> None:
    """Train one point of a sweep to its end, or resume that.

    Args:
        plan: The sweep.
        place: The trial's run folder, a path or URI.
        point: Dotted config key -> value, over the config of the plan.
        working_dir: Where the sweep was started, which relative paths in the config mean.
        note: What the trial is called in its manifest and in messages.
        **options: Passed on to `launch.train`.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # bars of several trials at once say nothing
    wait_until_ended(place)
    with contextlib.suppress(OSError):  # on another machine the folder may not exist
        os.chdir(working_dir)
    config = {**plan.config, "run": {"dir": place, "note": note}}
    cfg = trial_config(plan.config_class, config, storage.plain(point), source=note)
    plan.main(cfg, **options)


def is_finished(place: str) -> bool:
    """Whether the trial in a run folder came to its end by itself."""
    return manifest_at(place).get("status") == "finished"


def wait_until_ended(place: str, timeout_s: float = 10.0) -> None:
    """A process that was told to end, or whose driver died, holds the lock of its run folder until its very end."""
    deadline = time.monotonic() + timeout_s
    while storage.is_locked(open_folder(place).path) and time.monotonic() < deadline:
        time.sleep(0.1)


def last_line(error: BaseException) -> str:
    """The reason in an error from another process, whose text is a traceback."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
