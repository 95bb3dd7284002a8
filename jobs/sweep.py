"""Sweep a training job over a space of `tune_spaces/` with Ray Tune.

    eagleray sweep label_smoothing --config configs/gram/finetune_tiny.yaml --scheduler asha

The sweep is a run like any other: its `config.yaml` repeats it with `eagleray train`. Beside that it leaves
`table.md` and `table.csv` (best first), `report.json`, `plots/`, a run folder for each trial in `trials/`, and
`best.yaml`, which `eagleray train` runs as it is.
"""

from __future__ import annotations

import difflib
import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from eagleray.jobs.registry import job_name, load_job
from eagleray.platform import storage
from eagleray.platform.cluster import check_placement, connected
from eagleray.platform.config import ConfigError, load_config, to_yaml, validate_config
from eagleray.platform.runs import RunFolder, RunInterrupted
from eagleray.platform.sections import JobConfig, TrainingConfig
from eagleray.platform.sweep_plots import plot_by_value, plot_over_time
from eagleray.platform.sweep_results import (
    PointResult,
    TrialRecord,
    rank_points,
    read_trial,
    table_rows,
    to_csv,
    to_markdown,
)
from eagleray.platform.tuning import (
    SEED_KEY,
    SchedulerName,
    SearchName,
    Space,
    SweepPlan,
    build_scheduler,
    check_space,
    number_of_trials,
    run_trials,
    trial_config,
    trials_at_once,
)

logger = logging.getLogger(__name__)

JOB = "sweep"

SPACES = {
    "label_smoothing": "eagleray.tune_spaces.label_smoothing",
    "nast": "eagleray.tune_spaces.nast",
}
"""Space name -> module with `space(search)`, `METRIC`, `MODE` and `CURVES`."""

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
    """`asha` ends the worse half of the trials at the 1st, 2nd, 4th, 8th, ... evaluation."""
    num_samples: int | None = Field(default=None, ge=1)
    """Points to try with random and optuna; default: 10."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Trials at a time; default: as many as the cluster holds."""
    seeds: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Seeds to run each point with; its result is their mean. Default: the config's own seed."""

    @property
    def chosen_search(self) -> SearchName:
        """`search`, or its default."""
        return self.search or ("grid" if self.num_samples is None else "random")

    @model_validator(mode="after")
    def _options_fit(self) -> Config:
        if self.chosen_search == "grid" and self.num_samples is not None:
            raise ValueError("`num_samples` has no meaning for a grid; give `seeds` to repeat its points")
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("`seeds` has the same seed twice, which would give the same run twice")
        if self.seeds is not None and len(self.seeds) > 1:
            if self.chosen_search == "optuna":
                raise ValueError(
                    "optuna looks at single runs; give one seed, or take `search` grid or random"
                )
            if self.scheduler == "asha":
                raise ValueError(
                    "a mean over seeds needs whole runs; give one seed, or take `scheduler` none"
                )
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
    varied = load_space(space, "grid").domains
    taken = [key for key in (text.partition("=")[0] for text in overrides) if key in varied]
    if taken:
        raise ConfigError(f"`{taken[0]}` is set by the space `{space}`; remove it from the command line.")
    trial = base.model_dump(mode="json")
    values = {"run": trial.pop("run"), "ray": trial.pop("ray"), "space": space, "trial": trial, **options}
    return validate_config(Config, values, "command line")


def parse_seeds(text: str | None) -> list[int] | None:
    """Seeds from the command line: whole numbers with commas between them."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"`--seeds` is {text!r}; it takes whole numbers with commas, e.g. 0,1,2.") from None


def load_space(name: str, search: SearchName) -> Space:
    """Import a space.

    Raises:
        ConfigError: There is no such space.
    """
    if name not in SPACES:
        near = difflib.get_close_matches(name, SPACES, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ConfigError(f"There is no space `{name}`.{hint} The spaces are: {', '.join(sorted(SPACES))}.")
    module = importlib.import_module(SPACES[name])
    return Space(name, module.space(search), module.METRIC, module.MODE, module.CURVES)


def main(cfg: Config) -> SweptRun:
    """Check everything, run the trials, write what came out."""
    plan = _plan(cfg)
    run = RunFolder.create(JOB, cfg)
    try:
        with run.recording():
            return _sweep(plan, cfg, run)
    except RunInterrupted:
        raise KeyboardInterrupt(
            f"the trials that finished lie in {run.path / 'trials'}; a sweep cannot be resumed, start a new one."
        ) from None


def _plan(cfg: Config) -> SweepPlan:
    name = cfg.trial.get("job")
    if name is None:
        raise ConfigError("`trial.job` is missing; it says which training job to run, e.g. gram.finetune.")
    job = load_job(name)
    if not issubclass(job.Config, TrainingConfig):
        raise ConfigError(f"`trial.job` is {name}, which does not train; a sweep is over a training job.")
    values = {**cfg.trial, "ray": cfg.ray.model_dump(mode="json")}
    base = validate_config(job.Config, values, "trial")
    space = load_space(cfg.space, cfg.chosen_search)
    if base.train.metric not in (None, space.metric):
        raise ConfigError(
            f"`train.metric` is {base.train.metric!r}, but the space `{space.name}` selects by {space.metric!r}. "
            "Leave `train.metric` out: a trial should keep the model that the sweep judges it by."
        )
    check_space(space, job.Config, values, search=cfg.chosen_search)
    build_scheduler(cfg.scheduler, base.train)  # refuses what it cannot work with, before anything starts
    samples = 1 if cfg.chosen_search == "grid" else cfg.num_samples or _RANDOM_SAMPLES
    return SweepPlan(
        main=job.main,
        config_class=job.Config,
        config=values,
        space=space,
        search=cfg.chosen_search,
        scheduler=cfg.scheduler,
        samples=samples,
        seeds=cfg.seeds or (base.train.seed,),
    )


def _sweep(plan: SweepPlan, cfg: Config, run: RunFolder) -> SweptRun:
    if (run.path / "trials").exists():
        raise ConfigError(
            f"{run.path} holds the trials of an earlier attempt, and a sweep cannot be resumed. Set another `run.dir`."
        )
    run.update_manifest(seeds={"sweep": list(plan.seeds)})
    with connected(cfg.ray):
        check_placement(cfg.ray)
        outcomes = run_trials(plan, run.path, max_concurrent=_concurrency(plan, cfg))
    keep = validate_config(plan.config_class, plan.config, "trial").train.keep_model
    trials = [read_trial(outcome, plan.space, keep=keep) for outcome in outcomes]
    for trial in trials:
        if trial.status == "failed":
            logger.warning("Trial %s failed: %s", trial.name, trial.error)
    results = rank_points(trials, plan.space)
    _tell_ties(results, plan.space)
    table = _write_results(plan, cfg, run, trials, results)
    return SweptRun(run.path, table, _write_best(plan, cfg, run, results[0]))


def _concurrency(plan: SweepPlan, cfg: Config) -> int:
    fits, wanted = trials_at_once(cfg.ray), number_of_trials(plan)
    chosen = min(cfg.max_concurrent or fits, wanted)
    logger.info(
        "%d trial(s), %d at a time; the cluster holds %d (%d worker(s) x %g CPU each).",
        wanted,
        chosen,
        fits,
        cfg.ray.num_workers,
        cfg.ray.cpus_per_worker,
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


def _write_results(
    plan: SweepPlan, cfg: Config, run: RunFolder, trials: list[TrialRecord], results: list[PointResult]
) -> str:
    space, rows = plan.space, table_rows(results, plan.space)
    table = to_markdown(rows)
    storage.write_text(run.path / "table.md", table)
    storage.write_text(run.path / "table.csv", to_csv(rows))
    run.plots.mkdir(exist_ok=True)
    plot_over_time(trials, space, run.plots / f"{space.metric}_over_time.png")
    for key in space.varied:
        plot_by_value(results, space, key, space.curves or (space.metric,), run.plots / f"by_{key}.png")
    run.write_report(
        {
            "best": {**results[0].point, **results[0].metrics},
            "selected_by": {"metric": space.metric, "mode": space.mode},
            "space": space.name,
            "search": plan.search,
            "scheduler": plan.scheduler,
            "seeds": list(plan.seeds),
            "count": {
                status: sum(trial.status == status for trial in trials)
                for status in ("finished", "stopped", "failed")
            },
            "table": rows,
            "errors": {trial.name: trial.error for trial in trials if trial.error},
        }
    )
    return table


def _write_best(plan: SweepPlan, cfg: Config, run: RunFolder, best: PointResult) -> Path:
    point = {**best.point, SEED_KEY: best.trials[0].seed}
    cfg_best = trial_config(plan.config_class, plan.config, point, source="best point")
    path = run.path / "best.yaml"
    head = f"# Best of the sweep {run.path.name} over `{plan.space.name}` by {plan.space.metric}.\n"
    storage.write_text(path, head + to_yaml(cfg_best))
    return path


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
