"""Sweeps: many training runs over a space of config values, scheduled by Ray Tune.

A trial is an ordinary training run, through the `main` of its job, in a run folder of its own. Tune decides
which values come next and which trials end early; what came out is read from the run folders
(`platform/sweep_results.py`).

Special here (docs/decisions/0004-sweeps.md):
- What Tune runs for a trial only starts and watches the training run, so it takes no core from the workers.
- A trial that the scheduler stops gives its workers' resources back (`platform/leftovers.py`).
- Trials are named by their number and the same sweep tries the same points, so a sweep is resumed by running it
  again: a trial that finds its run folder goes on there, and tells Tune first what was evaluated before.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ray import tune
from ray.train import UserCallback
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator

from eagleray.platform import storage
from eagleray.platform.config import ConfigError, flatten
from eagleray.platform.imports import packed, unpacked
from eagleray.platform.leftovers import Leftovers
from eagleray.platform.remote import open_folder
from eagleray.platform.runs import CONFIG_FILE, RunFolder
from eagleray.platform.sections import TrainSection
from eagleray.platform.space import SEED_KEY, SchedulerName, Space, SweepPlan, TrialOutcome, shown
from eagleray.platform.tracking import RECORD_KEYS, read_metrics
from eagleray.platform.trial import is_finished, last_line, start_trial, trials_of, wait_until_ended

logger = logging.getLogger(__name__)

_HALVE = 2
"""ASHA: share of the trials that go on from one look to the next is one in this many."""

_MANY_LOOKS = 10_000
"""ASHA: bound on the evaluations of a run that depend on the data."""

_TUNE_SETTINGS = {
    # Ctrl-C ends the sweep like any run; Tune would swallow it and hand back half a sweep as a whole one.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # The metrics are in the run folders.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The newer output prints tables even when told to print nothing.
    "RAY_AIR_NEW_OUTPUT": "0",
}

_STOPPED_MARK = ".stopped"
"""File in the run folder of a trial that the scheduler stopped, so that a resumed sweep leaves it alone."""

_NO_CORES = {"memory": 1.0}
"""What Tune reserves for a trial's process: a byte, because Tune refuses to reserve nothing."""


def build_scheduler(name: SchedulerName, train: TrainSection) -> TrialScheduler | None:
    """The Tune scheduler of a sweep whose runs have this `train` section.

    Raises:
        ConfigError: A run has a single evaluation, so that there is nothing to decide by.
    """
    if name != "asha":
        return None
    looks = evaluations(train)
    if looks == 1:
        raise ConfigError(
            "`scheduler` is asha, which compares trials at their evaluations, but a run of this config has only "
            "one, at its end. Lower `train.eval_every`, or use `scheduler` none."
        )
    return ASHAScheduler(
        time_attr="training_iteration",  # counts reports, and a run reports its evaluations
        grace_period=1,
        reduction_factor=_HALVE,
        # No look at the last evaluation: stopping a run that is about to end saves nothing and loses its report.
        max_t=_MANY_LOOKS if looks is None else looks - 1,
        stop_last_trials=False,
    )


def evaluations(train: TrainSection) -> int | None:
    """Evaluations of a whole run, at most; `None` if that depends on the data."""
    if train.max_steps is None:
        return None if train.eval_every else 10
    return math.ceil(train.max_steps / (train.eval_every or max(1, math.ceil(train.max_steps / 10))))


def run_trials(plan: SweepPlan, run: RunFolder, *, max_concurrent: int) -> list[TrialOutcome]:
    """Run all trials of a sweep, or those that are left of one; a trial that fails does not end it.

    Ray must be connected.

    Args:
        plan: The sweep.
        run: Its run folder: run folders of the trials go into `trials/`, Tune's records into `ray/`.
        max_concurrent: Trials that run at a time.

    Returns:
        One outcome a trial, in the order of their numbers.
    """
    leftovers, trials = Leftovers(), trials_of(run)
    records = run.path / "ray"
    shutil.rmtree(records, ignore_errors=True)  # of an earlier attempt
    tuner = tune.Tuner(
        tune.with_resources(_trial_function(plan, trials, Path.cwd()), _NO_CORES),
        param_space=_param_space(plan),
        tune_config=tune.TuneConfig(
            metric=plan.space.metric,
            mode=plan.space.mode,
            scheduler=build_scheduler(plan.scheduler, plan.train),
            **_search_options(plan, max_concurrent, trials),
            # The next trial need not import everything again. Not with a scheduler: a trial that it stopped must lose its
            # process, which drives its workers.
            reuse_actors=plan.scheduler == "none",
            trial_name_creator=_trial_name(plan),
            trial_dirname_creator=_trial_name(plan),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(records),
            verbose=0,
            callbacks=[_Watcher(plan.space, leftovers, trials)],
        ),
    )
    with _quiet_tune():
        results = tuner.fit()
    leftovers.settle()
    outcomes = [_outcome(trials, result) for result in results]
    for outcome in outcomes:
        wait_until_ended(outcome.place)
    return sorted(outcomes, key=lambda outcome: outcome.name)


def _trial_function(plan: SweepPlan, trials: str, working_dir: Path) -> Callable[[dict[str, Any]], None]:
    packed_plan = packed(plan)

    def trial(point: dict[str, Any]) -> None:
        name = tune.get_context().get_trial_name()
        place = f"{trials}/{name}"
        for record in _earlier_evaluations(place):
            tune.report(record)
        if _ended(place):
            return
        options = {"working_dir": working_dir, "note": f"trial {name}", "callbacks": [_ReportToTune()]}
        start_trial(unpacked(packed_plan), place, point, **options)

    return trial


class _ReportToTune(UserCallback):
    """Passes on what worker 0 reports. Ray's own goes through an actor, as its controller runs elsewhere."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        tune.report(metrics[0])


def _earlier_evaluations(place: str) -> list[dict[str, Any]]:
    """What a trial of a resumed sweep evaluated up to where it goes on: schedulers count evaluations."""
    ended, run = _ended(place), RunFolder(place).fetch_records()
    done = max((int(name.removeprefix("step-")) for name in run.folder.checkpoints()), default=0)
    return [
        {key: value for key, value in record.items() if key not in RECORD_KEYS or key == "step"}
        for record in read_metrics(run.metrics)
        if record["kind"] == "eval" and (ended or record["step"] <= done)
    ]


def _ended(place: str) -> bool:
    return _STOPPED_MARK in open_folder(place).names() or is_finished(place)


def _param_space(plan: SweepPlan) -> dict[str, Any]:
    # A grid of seeds is the one grid that goes together with random points; optuna gets the seed as it is.
    first, *others = plan.seeds
    return {**plan.space.domains, SEED_KEY: tune.grid_search([first, *others]) if others else first}


def _search_options(plan: SweepPlan, max_concurrent: int, trials: str) -> dict[str, Any]:
    """Search algorithm, seeded by the first seed, and the limit on trials at a time in the form that it takes."""
    options: dict[str, Any] = {"num_samples": plan.samples}
    if plan.search == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        earlier = _earlier_points(plan, trials)
        # Another seed after a resume: the first one would draw the first points again.
        search = OptunaSearch(seed=plan.seeds[0] + len(earlier), points_to_evaluate=earlier)
        return {**options, "search_alg": search, "max_concurrent_trials": max_concurrent}
    search = BasicVariantGenerator(
        max_concurrent=max_concurrent,
        constant_grid_search=True,  # random points are drawn once, and tried with every seed
        random_state=plan.seeds[0],
    )
    return {**options, "search_alg": search}


def _earlier_points(plan: SweepPlan, trials: str) -> list[dict[str, Any]]:
    """The points of a resumed sweep, in the order of their trials: optuna's next depend on results and their order.

    A trial that was killed before it had written its config is given a new random point.
    """
    points = []
    numbers = [int(name) for name in open_folder(trials).names() if name.isdigit()]
    for number in range(1, max(numbers, default=0) + 1):
        values = {}
        with contextlib.suppress(FileNotFoundError):
            text = open_folder(f"{trials}/{_name(number)}").read_text(CONFIG_FILE)
            values = flatten(yaml.safe_load(text))
        rng = np.random.RandomState(number)
        points.append(
            {
                key: values[key] if key in values else plan.space.domains[key].sample(random_state=rng)
                for key in plan.space.varied
            }
        )
    return points


def _trial_name(plan: SweepPlan) -> Callable[[Trial], str]:
    """Names trials by their number, from 0001: Tune's ids are random, but it tags trials `<number>_<values>`."""
    first = 1 if plan.search == "optuna" else 0  # Tune counts differently for searchers

    def name(trial: Trial) -> str:
        return _name(int(trial.experiment_tag.partition("_")[0]) - first + 1)

    return name


def _name(number: int) -> str:
    return f"{number:04d}"


class _Watcher(tune.Callback):
    """Tells what happens and has leftovers released while trials run, so that the next ones find a place."""

    def __init__(self, space: Space, leftovers: Leftovers, trials: str) -> None:
        self._space, self._leftovers, self._trials = space, leftovers, trials
        self._next_release = 0.0

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if time.monotonic() >= self._next_release:
            self._leftovers.release()
            self._next_release = time.monotonic() + 1.0

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        point = ", ".join(f"{key} = {shown(trial.config[key])}" for key in [*self._space.varied, SEED_KEY])
        logger.info("Trial %s starts: %s.", trial, point)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        metric = self._space.metric
        logger.info("Trial %s, step %s: %s %s.", trial, result.get("step"), metric, shown(result.get(metric)))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        place = f"{self._trials}/{trial}"
        if not is_finished(place):
            open_folder(place).write_text(_STOPPED_MARK, "")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        logger.warning("Trial %s failed.", trial)


def _outcome(trials: str, result: Any) -> TrialOutcome:
    name = Path(result.path).name
    error = None
    if result.error is not None:
        error = last_line(result.error)
    return TrialOutcome(name, f"{trials}/{name}", storage.plain(result.config), error)


@contextlib.contextmanager
def _quiet_tune() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _TUNE_SETTINGS}
    level = logging.getLogger("ray.tune").level
    os.environ.update(_TUNE_SETTINGS)
    # A failed trial is told in one line; its traceback is in the manifest of its run.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logging.getLogger("ray.tune").setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
