"""Sweep a training job over a space of `tune_spaces/` with Ray Tune.

    eagleray sweep label_smoothing --config configs/gram/finetune_tiny.yaml --scheduler asha
    eagleray sweep --resume runs/sweep/20261120-101500-a1b2c3

The sweep is a run like any other: its `config.yaml` repeats it with `eagleray train`, and a sweep that was cut
short goes on where it was. It leaves tables (best first), `report.json`, `plots/`, a run folder for each trial in
`trials/`, and `best.yaml`, which `eagleray train` runs as it is.
"""

from __future__ import annotations

import difflib
import importlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from eagleray.jobs.registry import Job, job_name, load_job
from eagleray.platform.cluster import check_placement, connected, describe_needs
from eagleray.platform.config import ConfigError, load_config, validate_config
from eagleray.platform.population import Population, check_population, run_population, segment_ends
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import JobConfig, TrainingConfig, TrainSection
from eagleray.platform.space import (
    Objective,
    SchedulerName,
    SearchName,
    Space,
    SweepPlan,
    check_space,
    limit_space,
    number_of_trials,
    trial_config,
)
from eagleray.platform.sweep_report import write_best, write_results
from eagleray.platform.sweep_results import PointResult, TrialRecord, join_segments, rank_points, read_trial
from eagleray.platform.task import Task
from eagleray.platform.tuning import build_scheduler, run_trials

logger = logging.getLogger(__name__)

JOB = "sweep"

SPACES = {
    "label_smoothing": "eagleray.tune_spaces.label_smoothing",
    "label_count": "eagleray.tune_spaces.label_count",
    "optim": "eagleray.tune_spaces.optim",
    "lisa_rank": "eagleray.tune_spaces.lisa_rank",
    "margin_scale": "eagleray.tune_spaces.margin_scale",
    "nast": "eagleray.tune_spaces.nast",
}
"""Space name -> module with `space(search)` and, unless the job's own metric selects, `METRIC`, `MODE`, `CURVES`; perhaps
with `FURTHER` objectives and a key that is `LIMITED_BY_MODEL`."""

_RANDOM_SAMPLES = 10


class Config(JobConfig):
    """Config of `sweep`; `ray` says what each trial gets, and where the cluster is."""

    job: Literal["sweep"] = JOB
    space: str
    """Name of a module in `tune_spaces/`."""
    trial: dict[str, Any]
    """Config of the training job that every trial runs, with its `job`, without `run` and `ray`."""
    search: SearchName | None = None
    """`grid`: each value of the space once. `random`, `optuna`: values from its ranges, blindly or guided by the
    results so far. Default: grid, or random if `num_samples` is given."""
    scheduler: SchedulerName = "none"
    """`asha` ends the worse half of the trials at the 1st, 2nd, 4th, 8th, ... evaluation. `pbt`: the worse quarter goes
    on from the better quarter with changed values, again and again."""
    perturb_every: int | None = Field(default=None, ge=1)
    """Optimiser steps after which `pbt` does so; default: a quarter of the run."""
    objectives: tuple[str, ...] = ()
    """What is wanted, each `metric:max` or `metric:min`; the first selects. With several, the points that no other
    beats in everything are told too. Default: the metric of the space, or of the job."""
    num_samples: int | None = Field(default=None, ge=1)
    """Points to try with random and optuna; default: 10."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Trials at a time; default: as many as the cluster holds."""
    seeds: PositiveInt | Annotated[tuple[int, ...], Field(min_length=1)] = 1
    """Seeds to run each point with, as a list or as a number of seeds from the config's own on; a point's result is
    their mean."""

    @property
    def chosen_search(self) -> SearchName:
        """`search`, or its default."""
        return self.search or ("grid" if self.num_samples is None else "random")

    @model_validator(mode="after")
    def _options_fit(self) -> Config:
        if self.chosen_search == "grid" and self.num_samples is not None:
            raise ValueError("`num_samples` has no meaning for a grid; give `seeds` to repeat its points")
        if isinstance(self.seeds, tuple) and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("`seeds` has the same seed twice, which would give the same run twice")
        if (self.seeds if isinstance(self.seeds, int) else len(self.seeds)) > 1:
            if self.chosen_search == "optuna":
                raise ValueError(
                    "optuna looks at single runs; give one seed, or take `search` grid or random"
                )
            if self.scheduler != "none":
                raise ValueError(
                    "a mean over seeds needs whole runs; give one seed, or take `scheduler` none"
                )
        if self.scheduler == "pbt" and self.chosen_search == "optuna":
            raise ValueError("`scheduler` pbt finds its points itself; take `search` grid or random")
        if self.scheduler != "pbt" and self.perturb_every is not None:
            raise ValueError("`perturb_every` is for `scheduler` pbt only")
        return self


@dataclass(frozen=True)
class SweptRun:
    """A finished sweep."""

    path: Path
    """Its run folder."""
    table: str
    """Markdown table of the points, best first."""
    best: Path
    """Config file of the best point."""


def sweep_config(space: str, path: Path, overrides: Sequence[str], **options: Any) -> Config:
    """The sweep that the command line asks for.

    Args:
        space: Name of the space.
        path: Config file of the training job.
        overrides: `key=value` settings of the training job; `run.*` and `ray.*` hold for the sweep.
        **options: Further fields of `Config`.

    Raises:
        ConfigError: Something is unknown or does not fit together.
    """
    base = load_config(load_job(job_name(path)).Config, path, overrides)
    domains = _space_module(space).space("grid")
    taken = [key for key in (text.partition("=")[0] for text in overrides) if key in domains]
    if taken:
        raise ConfigError(f"`{taken[0]}` is set by the space `{space}`; remove it from the command line.")
    trial = base.model_dump(mode="json")
    values = {"run": trial.pop("run"), "ray": trial.pop("ray"), "space": space, "trial": trial, **options}
    return validate_config(Config, values, "command line")


def resumed_config(place: str) -> Config:
    """The sweep that a folder holds, a path or URI, to go on with it there.

    Raises:
        ConfigError: The folder holds no sweep.
    """
    path = RunFolder(place).fetch_records().config
    if not path.is_file() or job_name(path) != JOB:
        raise ConfigError(f"{place} holds no sweep; give the run folder of one, by default in runs/{JOB}/.")
    return load_config(Config, path, [f"run.dir={json.dumps(place)}"])


def parse_seeds(text: str) -> int | list[int]:
    """Seeds from the command line: how many, or whole numbers with commas between them."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"`--seeds` is {text!r}; it takes a number of seeds, e.g. 3, or a list with commas, e.g. 0,1,2."
        ) from None
    return seeds if "," in text else seeds[0]


def load_space(name: str, search: SearchName, job: Job) -> Space:
    """Import a space.

    Args:
        name: Name of the space.
        search: How its points are chosen.
        job: The training job, whose own metric selects if the space names none.

    Raises:
        ConfigError: There is no such space.
    """
    module = _space_module(name)
    domains, curves = module.space(search), getattr(module, "CURVES", ())
    if hasattr(module, "METRIC"):
        further = tuple(Objective.parse(text) for text in getattr(module, "FURTHER", ()))
        return Space(name, domains, module.METRIC, module.MODE, curves, further)
    task = _task(job)
    return Space(name, domains, task.metric, task.mode, curves)


def main(cfg: Config) -> SweptRun:
    """Check everything, run the trials, write what came out."""
    plan = _plan(cfg)
    run = RunFolder.create(JOB, cfg, shared=_common_work(plan) is not None)
    with run.recording():
        return _sweep(plan, cfg, run)


def _space_module(name: str) -> Any:
    if name not in SPACES:
        near = difflib.get_close_matches(name, SPACES, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ConfigError(f"There is no space `{name}`.{hint} The spaces are: {', '.join(sorted(SPACES))}.")
    return importlib.import_module(SPACES[name])


def _task(job: Job) -> type[Task]:
    """The task of a training job: the one that its module defines."""
    members = vars(job).values()
    (task,) = [
        c
        for c in members
        if isinstance(c, type) and issubclass(c, Task) and c.__module__ == job.Config.__module__
    ]
    return task


def _plan(cfg: Config) -> SweepPlan:
    name = cfg.trial.get("job")
    if name is None:
        raise ConfigError("`trial.job` is missing; it says which training job to run, e.g. gram.finetune.")
    job = load_job(name)
    if not issubclass(job.Config, TrainingConfig):
        raise ConfigError(f"`trial.job` is {name}, which does not train; a sweep is over a training job.")
    values = {**cfg.trial, "ray": cfg.ray.model_dump(mode="json")}
    base = validate_config(job.Config, values, "trial")
    space = load_space(cfg.space, cfg.chosen_search, job)
    space = space.judged_by([Objective.parse(text) for text in cfg.objectives])
    limited = getattr(_space_module(cfg.space), "LIMITED_BY_MODEL", None)
    if limited is not None:
        space = limit_space(space, limited, job.Config, values)
    check_space(space, job.Config, values, search=cfg.chosen_search)
    values = _kept_alike(values, base.train, space, _task(job))
    build_scheduler(cfg.scheduler, base.train)  # refuses what it cannot work with, before anything starts
    samples = 1 if cfg.chosen_search == "grid" else cfg.num_samples or _RANDOM_SAMPLES
    seeds = cfg.seeds
    if isinstance(seeds, int):
        seeds = tuple(range(base.train.seed, base.train.seed + seeds))
    plan = SweepPlan(
        main=job.main,
        config_class=job.Config,
        config=values,
        space=space,
        search=cfg.chosen_search,
        scheduler=cfg.scheduler,
        samples=samples,
        seeds=seeds,
        perturb_every=cfg.perturb_every,
    )
    if cfg.scheduler == "pbt":
        check_population(space, base.train, size=number_of_trials(plan))
        segment_ends(base.train, cfg.perturb_every)
    return plan


def _kept_alike(
    values: dict[str, Any], train: TrainSection, space: Space, task: type[Task]
) -> dict[str, Any]:
    """The trials' config, so that a trial keeps the model that the sweep judges it by."""
    if train.metric not in (None, space.metric):
        raise ConfigError(
            f"`train.metric` is {train.metric!r}, but the sweep selects by {space.metric!r}. "
            "Leave `train.metric` out: a trial should keep the model that the sweep judges it by."
        )
    if train.keep_model == "last" or (space.metric, space.mode) == (task.metric, task.mode):
        return values
    if space.mode != task.mode:
        raise ConfigError(
            f"The sweep selects by {space.metric}:{space.mode}, but this job can keep the model of the "
            f"{task.mode} of a metric only. Set `train.keep_model=last`; then the last evaluation of a trial counts."
        )
    return {**values, "train": {**values.get("train", {}), "metric": space.metric}}


def _sweep(plan: SweepPlan, cfg: Config, run: RunFolder) -> SweptRun:
    run.update_manifest(seeds={"sweep": list(plan.seeds)})
    plan = _with_common_work(plan, run)
    with connected(cfg.ray):
        max_concurrent = _concurrency(plan, cfg)
        trials = _run(plan, run, max_concurrent)
    for trial in trials:
        if trial.status == "failed":
            logger.warning("Trial %s failed: %s", trial.name, trial.error)
    results = rank_points(trials, plan.space)
    _tell_ties(results, plan.space)
    exploits = Population.load(run).exploits
    table = write_results(plan, run, trials, results, exploits)
    return SweptRun(run.path, table, write_best(plan, run, results[0]))


def _common_work(plan: SweepPlan) -> Callable[[TrainingConfig, Path], dict[str, Any]] | None:
    """What the job does once for all trials, into the sweep's folder, if it has such work: `prepare_sweep`."""
    return getattr(importlib.import_module(plan.main.__module__), "prepare_sweep", None)


def _with_common_work(plan: SweepPlan, run: RunFolder) -> SweepPlan:
    """The plan with the values that stand for what was done once for all trials."""
    prepare = _common_work(plan)
    if prepare is None:
        return plan
    common = prepare(validate_config(plan.config_class, plan.config, "trial"), run.path)
    trial = trial_config(plan.config_class, plan.config, common, source="trial")
    return replace(plan, config=trial.model_dump(mode="json"))


def _run(plan: SweepPlan, run: RunFolder, max_concurrent: int) -> list[TrialRecord]:
    keep = plan.train.keep_model
    if plan.scheduler == "pbt":
        trials = run_population(plan, run, max_concurrent=max_concurrent)
        parts = [[read_trial(outcome, plan.space, keep=keep) for outcome in trial] for trial in trials]
        return [join_segments(trial, plan.space, keep=keep) for trial in parts]
    outcomes = run_trials(plan, run, max_concurrent=max_concurrent)
    return [read_trial(outcome, plan.space, keep=keep) for outcome in outcomes]


def _concurrency(plan: SweepPlan, cfg: Config) -> int:
    """Trials at a time: what the empty cluster holds, unless the user says otherwise."""
    fits, wanted = check_placement(cfg.ray), number_of_trials(plan)
    chosen = min(cfg.max_concurrent or fits, wanted)
    logger.info(
        "%d trial(s), %d at a time; the cluster holds %d of %s each (what drives a trial takes no core).",
        wanted,
        chosen,
        fits,
        describe_needs(cfg.ray),
    )
    if chosen > fits:
        logger.warning("`max_concurrent` is %d; trials beyond %d wait for the cluster to grow.", chosen, fits)
    return chosen


def _tell_ties(results: list[PointResult], space: Space) -> None:
    best = results[0].metrics[space.metric]
    tied = sum(r.status == "finished" and r.metrics.get(space.metric) == best for r in results)
    if tied > 1:
        logger.warning(
            "%d points share the best %s, %g; the first of them is taken.", tied, space.metric, best
        )


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
