"""Sweeps: many training runs over a space of config values, scheduled by Ray Tune.

A trial is an ordinary training run, through the `main` of its job, in a run folder of its own. Tune decides
which values come next and which trials end early; what came out is read from the run folders
(`platform/sweep_results.py`).

Special here (docs/decisions/0004-sweeps.md):
- What Tune runs for a trial only starts and watches the training run, so it takes no core from the workers.
- A trial that the scheduler stops gives its workers' resources back (`platform/leftovers.py`).
- Trials are named by their number, so the same sweep makes the same folders.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.sample import Categorical, Domain

from eagleray.platform import storage
from eagleray.platform.cluster import wants_gpu
from eagleray.platform.config import ConfigError, validate_config
from eagleray.platform.leftovers import Leftovers, TrialTrainer
from eagleray.platform.sections import RaySection, TrainingConfig, TrainSection

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=TrainingConfig)
Mode = Literal["min", "max"]
SearchName = Literal["grid", "random", "optuna"]
SchedulerName = Literal["none", "asha"]

SEED_KEY = "train.seed"

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

_NO_CORES = {"memory": 1.0}
"""What Tune reserves for a trial's process: a byte, because Tune refuses to reserve nothing."""


@dataclass(frozen=True)
class Space:
    """What a sweep varies and by what its trials are judged."""

    name: str
    domains: dict[str, Any]
    """Dotted config key -> Tune domain, `tune.grid_search`, or a value that all trials take."""
    metric: str
    """Evaluation metric that selects; must mean the same in every trial."""
    mode: Mode
    curves: tuple[str, ...] = ()
    """Evaluation metrics to draw against the varied keys."""

    @property
    def varied(self) -> list[str]:
        """The keys that differ between trials."""
        return [key for key, domain in self.domains.items() if _is_varied(domain)]


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that has been checked; pickled to every trial."""

    main: Callable[..., Any]
    """`main(cfg, **options)` of a training job."""
    config_class: type[TrainingConfig]
    config: dict[str, Any]
    """Config of the trials, before the values of the space are set."""
    space: Space
    search: SearchName
    scheduler: SchedulerName
    samples: int
    """Trials for each seed, with a grid: how often it is tried."""
    seeds: tuple[int, ...]
    """Values of `train.seed` that each point is run with."""


@dataclass(frozen=True)
class TrialOutcome:
    """How a trial ended, as Tune saw it."""

    name: str
    path: Path
    """The trial's run folder."""
    point: dict[str, Any]
    """Its value of every key of the space, and its seed."""
    error: str | None
    """Why it failed; `None` for a trial that finished or was stopped by the scheduler."""


def check_space(space: Space, cls: type[C], config: dict[str, Any], *, search: SearchName) -> None:
    """Refuse a space that cannot work, before anything starts.

    Args:
        space: What to check.
        cls: Config class that the keys belong to.
        config: Config of the trials without the space's values.
        search: How points are chosen.

    Raises:
        ConfigError: The space does not fit the search, selects by something that cannot be compared, has a
            key that the config does not have, or values that the config does not allow.
    """
    _check_metric(space)
    source = f"space `{space.name}`"
    if not space.varied:
        raise ConfigError(f"{source}: nothing varies.")
    grids = [key for key in space.varied if _is_grid(space.domains[key])]
    if search == "grid" and grids != space.varied:
        open_keys = ", ".join(f"`{key}`" for key in space.varied if key not in grids)
        raise ConfigError(f"{source}: {open_keys} has no grid. Use `search` random or optuna.")
    if search != "grid" and grids:
        raise ConfigError(f"{source}: `{grids[0]}` is a grid, which only `search` grid can try.")
    probes = {key: _probes(domain) for key, domain in space.domains.items()}
    first = {key: values[0] for key, values in probes.items()}
    for key, values in probes.items():
        for value in values:
            trial_config(cls, config, {**first, key: value}, source=source)


def build_scheduler(name: SchedulerName, train: TrainSection) -> TrialScheduler | None:
    """The Tune scheduler of a sweep whose runs have this `train` section.

    Raises:
        ConfigError: A run has a single evaluation, so that there is nothing to decide by.
    """
    if name == "none":
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


def trial_config(cls: type[C], config: Mapping[str, Any], point: Mapping[str, Any], *, source: str) -> C:
    """`config` with the values of a point set, validated.

    Raises:
        ConfigError: A key does not exist or a value is not allowed; `source` says who asked for it.
    """
    values = copy.deepcopy(dict(config))
    for key, value in point.items():
        *parents, leaf = key.split(".")
        node = values
        for name in parents:
            if not isinstance(node.get(name), dict):
                node[name] = {}
            node = node[name]
        node[leaf] = value
    return validate_config(cls, values, source)


def trials_at_once(section: RaySection) -> int:
    """How many runs with this `ray` section the cluster, when empty, holds at a time; may be 0."""
    need = {"CPU": section.cpus_per_worker} | ({"GPU": 1.0} if wants_gpu(section) else {})
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    workers = sum(min(int(node.get(name, 0) // amount) for name, amount in need.items()) for node in nodes)
    return workers // section.max_workers


def evaluations(train: TrainSection) -> int | None:
    """Evaluations of a whole run, at most; `None` if that depends on the data."""
    if train.max_steps is None:
        return None if train.eval_every else 10
    return math.ceil(train.max_steps / (train.eval_every or max(1, math.ceil(train.max_steps / 10))))


def number_of_trials(plan: SweepPlan) -> int:
    """How many trials the sweep starts, whatever the scheduler does with them."""
    grids = [plan.space.domains[key] for key in plan.space.varied if _is_grid(plan.space.domains[key])]
    return math.prod(len(grid["grid_search"]) for grid in grids) * plan.samples * len(plan.seeds)


def shown(value: Any) -> str:
    """A value of a point in few characters."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def run_trials(plan: SweepPlan, folder: Path, *, max_concurrent: int) -> list[TrialOutcome]:
    """Run all trials of a sweep; a trial that fails does not end it. Ray must be connected.

    Args:
        plan: The sweep.
        folder: Absolute folder, shared by all nodes: run folders go into `trials/`, Tune's records into `tune/`.
        max_concurrent: Trials that run at a time.

    Returns:
        One outcome a trial, in the order of their numbers.
    """
    leftovers, trials_dir = Leftovers(), folder / "trials"
    tuner = tune.Tuner(
        tune.with_resources(_trial_function(plan, trials_dir, Path.cwd()), _NO_CORES),
        param_space=_param_space(plan),
        tune_config=tune.TuneConfig(
            metric=plan.space.metric,
            mode=plan.space.mode,
            scheduler=build_scheduler(plan.scheduler, _train_section(plan)),
            **_search_options(plan, max_concurrent),
            trial_name_creator=_trial_name(plan),
            trial_dirname_creator=_trial_name(plan),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            verbose=0,
            callbacks=[_Watcher(plan.space, leftovers)],
        ),
    )
    with _quiet_tune():
        results = tuner.fit()
    leftovers.settle()
    outcomes = [_outcome(trials_dir, result) for result in results]
    for outcome in outcomes:
        _wait_until_ended(outcome.path)
    return sorted(outcomes, key=lambda outcome: outcome.name)


def _trial_function(plan: SweepPlan, trials_dir: Path, working_dir: Path) -> Callable[[dict[str, Any]], None]:
    def trial(point: dict[str, Any]) -> None:
        from ray.tune.integration.ray_train import TuneReportCallback
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # bars of several trials at once say nothing
        # Tune starts trials in folders of their own; relative paths in the config mean where the sweep started.
        with contextlib.suppress(OSError):
            os.chdir(working_dir)
        name = tune.get_context().get_trial_name()
        config = {**plan.config, "run": {"dir": str(trials_dir / name), "note": f"trial {name}"}}
        cfg = trial_config(plan.config_class, config, storage.plain(point), source=f"trial {name}")
        plan.main(cfg, callbacks=[TuneReportCallback()], trainer_class=TrialTrainer)

    return trial


def _param_space(plan: SweepPlan) -> dict[str, Any]:
    # A grid of seeds is the one grid that goes together with random points; optuna gets the seed as it is.
    first, *others = plan.seeds
    return {**plan.space.domains, SEED_KEY: tune.grid_search([first, *others]) if others else first}


def _search_options(plan: SweepPlan, max_concurrent: int) -> dict[str, Any]:
    """Search algorithm, seeded by the first seed, and the limit on trials at a time in the form that it takes."""
    options: dict[str, Any] = {"num_samples": plan.samples}
    if plan.search == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        search = OptunaSearch(seed=plan.seeds[0])
        return {**options, "search_alg": search, "max_concurrent_trials": max_concurrent}
    search = BasicVariantGenerator(
        max_concurrent=max_concurrent,
        constant_grid_search=True,  # random points are drawn once, and tried with every seed
        random_state=plan.seeds[0],
    )
    return {**options, "search_alg": search}


def _train_section(plan: SweepPlan) -> TrainSection:
    return validate_config(plan.config_class, plan.config, "trial").train


def _trial_name(plan: SweepPlan) -> Callable[[Trial], str]:
    """Names trials by their number, from 0001: Tune's ids are random, but it tags trials `<number>_<values>`."""
    first = 1 if plan.search == "optuna" else 0  # Tune counts differently for searchers

    def name(trial: Trial) -> str:
        return f"{int(trial.experiment_tag.partition('_')[0]) - first + 1:04d}"

    return name


class _Watcher(tune.Callback):
    """Tells what happens and has leftovers released while trials run, so that the next ones find a place."""

    def __init__(self, space: Space, leftovers: Leftovers) -> None:
        self._space, self._leftovers = space, leftovers
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

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        logger.warning("Trial %s failed.", trial)


def _outcome(trials_dir: Path, result: Any) -> TrialOutcome:
    name = Path(result.path).name
    error = None
    if result.error is not None:
        lines = str(result.error).strip().splitlines()
        error = lines[-1] if lines else type(result.error).__name__
    return TrialOutcome(name, trials_dir / name, storage.plain(result.config), error)


def _wait_until_ended(path: Path, timeout_s: float = 10.0) -> None:
    """A stopped trial's process holds the lock of its run folder until its very end."""
    deadline = time.monotonic() + timeout_s
    while storage.is_locked(path) and time.monotonic() < deadline:
        time.sleep(0.1)


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


def _check_metric(space: Space) -> None:
    varied_loss = [key for key in space.varied if key.split(".")[0] == "loss"]
    if varied_loss and "loss" in space.metric.replace("/", "_").split("_"):
        raise ConfigError(
            f"space `{space.name}` selects by `{space.metric}` and varies `{varied_loss[0]}`. A key under `loss` "
            "changes what the loss measures, so its values cannot be compared between trials and the least one "
            "says nothing. Select by a metric that is the same function for all trials, e.g. accuracy."
        )


def _is_grid(domain: Any) -> bool:
    return isinstance(domain, dict) and set(domain) == {"grid_search"}


def _is_varied(domain: Any) -> bool:
    return _is_grid(domain) or isinstance(domain, Domain)


def _probes(domain: Any) -> Sequence[Any]:
    """Values by which a domain is checked: all of a grid or of a choice, some of a range."""
    if _is_grid(domain):
        return domain["grid_search"]
    if isinstance(domain, Categorical):
        return domain.categories
    if isinstance(domain, Domain):
        return storage.plain(domain.sample(size=20, random_state=0))
    return [domain]
