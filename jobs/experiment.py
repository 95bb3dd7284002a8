"""Whole experiments: the stages of a paper as one file, run as a graph, ending in one report.

    eagleray experiment run configs/experiments/gram_tiny.yaml

Each stage is a job with its own config; `${name}` in it is the run folder of another stage. What is done is not run
again (`platform/experiment.py` says what counts as done), independent stages run side by side, and what was stopped,
killed or failed goes on with the same command. docs/experiments.md tells more.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator
from rich.console import Console
from rich.table import Table

from eagleray.jobs.registry import JOBS, job_name, load_job
from eagleray.platform import storage
from eagleray.platform.config import Config as Section
from eagleray.platform.config import ConfigError, load_config, to_yaml, validate_config
from eagleray.platform.experiment import Definition, Stage, merged, plan_stages, substitute
from eagleray.platform.experiment_repeat import Repetition, Value, grouped, repeat, repetitions
from eagleray.platform.experiment_report import Published, Wanted, read_figures, write_experiment
from eagleray.platform.experiment_run import Need, Outcome, makespan, run_stages
from eagleray.platform.progress import format_seconds
from eagleray.platform.runs import CONFIG_FILE, MANIFEST_FILE
from eagleray.platform.sections import JobConfig, RaySection

JOB = "experiment"
logger = logging.getLogger(__name__)


class ExperimentFailed(ValueError):
    """Stages failed; the message names them and says how to go on."""


class StageSection(Section):
    """One stage."""

    config: str | None = None
    """Config file of its job; default: `set` holds everything, `job` too."""
    set: dict[str, Any] = Field(default={})
    """Keys over the file's, nested as in a file; `${name}` is the run folder of another stage."""
    after: list[str] = Field(default=[])
    """Stages that must be done before although no key refers to them."""
    each: dict[str, Annotated[list[Value], Field(min_length=1)]] = Field(default={})
    """Repeats the stage for all combinations of these values, by name: `{seed: [0, 1, 2]}`."""
    minutes: float | None = Field(default=None, gt=0)
    """About how long it takes on the machine that `size` speaks of, for the estimate of `--dry-run`."""


class PublishedSection(Section):
    """A figure from a paper."""

    value: float
    setting: str = Field(min_length=1)
    """Which model and data it is of, and where it stands."""


class ResultSection(Section):
    """One line of the final table."""

    label: str
    stage: str
    """Its stage; one that is repeated makes a line of each, and `${name}` in `label` is the value."""
    mean_over: list[str] = Field(default=[])
    """What the stage is repeated over that the line is a mean over, e.g. `[seed]`; with a 95 % t-interval."""
    metric: str
    """Dotted name in the stage's report, as `eagleray runs show` prints it."""
    unit: str = ""
    """Unit after scaling; lines of one unit share a panel of the plot."""
    scale: float = 1
    """Factor from the report to the unit, e.g. 100 for percent."""
    published: PublishedSection | None = None


class Config(JobConfig):
    """Config of `experiment`; of `ray` only `address` counts, and each stage's own `ray` section."""

    job: Literal["experiment"] = JOB
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the folder in `<run.root>/experiments`, unless `run.dir` gives another."""
    title: str
    """What the experiment is about."""
    size: str
    """How large our models are and on what they run; stands beside every figure."""
    data: str
    """On what data."""
    cores: int | None = Field(default=None, ge=1)
    """CPU cores for all stages together; default: those of this machine, or of the cluster."""
    stages: dict[str, StageSection] = Field(min_length=1)
    """Stages by name."""
    results: list[ResultSection] = Field(default=[])
    """The final table."""

    @field_validator("stages")
    @classmethod
    def _names_are_file_names(cls, stages: dict[str, StageSection]) -> dict[str, StageSection]:
        bad = [name for name in stages if not name.replace("_", "").replace("-", "").isalnum()]
        if bad:
            raise ValueError(f"`{bad[0]}` cannot name a stage; take letters, digits, _ and -")
        values = [str(v) for stage in stages.values() for listed in stage.each.values() for v in listed]
        bad = [value for value in values if not re.fullmatch(r"[A-Za-z0-9_.+-]+", value)]
        if bad:
            raise ValueError(
                f"`{bad[0]}` cannot stand in `each`, whose values become part of names; take letters, digits, _, ., + and -"
            )
        return stages

    @property
    def folder(self) -> Path:
        """The experiment's folder."""
        return Path(self.run.dir or Path(self.run.root, "experiments", self.name)).expanduser().absolute()

    @property
    def repetitions(self) -> dict[str, Repetition]:
        """All stages by name, repeated ones as often as `each` says."""
        return repetitions({name: stage.each for name, stage in self.stages.items()})


def main(cfg: Config) -> str:
    """Run what is not done, and write the report.

    Returns:
        The table, as Markdown.

    Raises:
        ConfigError: The file, or the config of a stage that is not done, can't be used; nothing has been started then.
        ExperimentFailed: Stages failed.
        RunInterrupted: A signal came.
    """
    stages, root = plan(cfg), cfg.folder
    root.mkdir(parents=True, exist_ok=True)
    lock = storage.FolderLock(root)
    lock.acquire()
    try:
        resolved = cfg.model_copy(update={"run": cfg.run.model_copy(update={"dir": str(root)})})
        storage.write_text(root / CONFIG_FILE, to_yaml(resolved))
        outcomes = _run(cfg, stages, root)
        figures = read_figures(_wanted(cfg), {stage.name: stage for stage in stages})
        about = {"name": cfg.name, "title": cfg.title, "size": cfg.size, "data": cfg.data}
        table = write_experiment(root, about, stages, outcomes, figures)
    finally:
        lock.release()
    print(table)
    _raise_if_failed(outcomes, stages, root)
    return table


def plan(cfg: Config) -> list[Stage]:
    """The stages with their keys and folders; nothing of a job is imported.

    Raises:
        ConfigError: A file can't be read, or references or results name what there is not.
    """
    _wanted(cfg)
    written = {name: _definition(name, stage) for name, stage in cfg.stages.items()}
    return plan_stages(repeat(written, cfg.repetitions), cfg.folder)


def dry_run(cfg: Config, console: Console) -> None:
    """Print the graph, what each stage takes, and an estimate; nothing is started or written but file hashes."""
    stages = plan(cfg)
    needs, have = _needs(cfg, stages)
    seconds = {s.name: t for s in stages if s.state != "done" and (t := _estimate(cfg, s)) is not None}
    table = Table(title=cfg.title, title_justify="left")
    for column in ("stage", "job", "needs", "takes", "state", "about"):
        table.add_column(column, overflow="fold")
    for stage in stages:
        takes = str(needs[stage.name]) if stage.name in needs else ""
        about = format_seconds(seconds[stage.name]) if stage.name in seconds else ""
        state = {"begun": "to go on", "new": "to do"}.get(stage.state, stage.state)
        table.add_row(stage.name, stage.job, ", ".join(stage.needs), takes, state, about)
    console.print(table)
    todo = [stage for stage in stages if stage.state != "done"]
    unknown = len(todo) - len(seconds)
    console.print(
        f"{len(stages)} stages, {len(todo)} to run, with {have} for all of them. Folder: {cfg.folder}",
        soft_wrap=True,
    )
    if seconds:
        whole, side_by_side = sum(seconds.values()), makespan(stages, seconds, needs, have)
        more = f", and {unknown} stage(s) of unknown length" if unknown else ""
        console.print(
            f"About {format_seconds(side_by_side)} ({format_seconds(whole)} one after the other){more}.",
            soft_wrap=True,
        )


def _definition(name: str, section: StageSection) -> Definition:
    values: dict[str, Any] = {}
    if section.config is not None:
        job = job_name(section.config)  # tells a missing or broken file by its name
        values = load_config(_AnyConfig, section.config).model_dump()
    values = merged(values, section.set)
    job = values.pop("job", None)
    if job is None or job == JOB:
        raise ConfigError(
            f"`stages.{name}` names no job. Give `config: FILE`, or `job` in `set`; the jobs are: {', '.join(sorted(JOBS))}."
        )
    if job not in JOBS:
        load_job(job)  # says which are near
    return Definition(job, values, tuple(section.after))


class _AnyConfig(Section):
    """A config file as it stands."""

    model_config = ConfigDict(extra="allow")


def _run(cfg: Config, stages: Sequence[Stage], root: Path) -> dict[str, Outcome]:
    todo = [stage.name for stage in stages if stage.state != "done"]
    if not todo:
        logger.info("Nothing to run: all %d stages are done.", len(stages))
        return {stage.name: Outcome("done") for stage in stages}
    needs, have = _needs(cfg, stages)
    logger.info(
        "%d of %d stages to run, with %s for all of them: %s.", len(todo), len(stages), have, ", ".join(todo)
    )
    launcher = [sys.executable, "-m", "eagleray.jobs.cli", "train"]
    return run_stages(
        stages, root, launcher, needs, have, assign_gpus=cfg.ray.address is None and have.gpus > 0
    )


def _needs(cfg: Config, stages: Sequence[Stage]) -> tuple[dict[str, Need], Need]:
    """What each stage that is not done takes, and what there is; each config is checked on the way.

    Raises:
        ConfigError: A config can't be used, or asks for more than there is.
    """
    todo = [stage for stage in stages if stage.state != "done"]
    have = _capacity(cfg) if todo else Need(0)
    needs: dict[str, Need] = {}
    for stage in todo:
        if cfg.ray.address is not None:
            stage.values["ray"] = {**(stage.values.get("ray") or {}), "address": cfg.ray.address}
        section = cfg.stages[cfg.repetitions[stage.name].stage]
        source = f"`stages.{stage.name}` ({section.config or 'set'})"
        checked = validate_config(load_job(stage.job).Config, {"job": stage.job, **stage.values}, source)
        need = needs[stage.name] = _need(checked.ray, have)
        if need.cpus > have.cpus or need.gpus > have.gpus:
            raise ConfigError(
                f"{source} needs {need}; there are {have}. Lower `ray.num_workers` or `ray.cpus_per_worker` in "
                f"`stages.{stage.name}.set`, or name a larger cluster as `ray.address`."
            )
    return needs, have


def _need(ray: RaySection, have: Need) -> Need:
    gpus = (
        ray.max_workers
        if ray.use_gpu is True or (ray.use_gpu == "auto" and have.gpus >= ray.min_workers)
        else 0
    )
    return Need(
        min(ray.max_workers * ray.cpus_per_worker, max(have.cpus, ray.min_workers * ray.cpus_per_worker)),
        gpus,
    )


def _capacity(cfg: Config) -> Need:
    """Cores and GPUs of the cluster, or of this machine."""
    if cfg.ray.address is None:
        return Need(cfg.cores or len(os.sched_getaffinity(0)), _local_gpus())
    import ray

    from eagleray.platform.cluster import connected

    with connected(cfg.ray):
        resources: Mapping[str, float] = ray.cluster_resources()
    return Need(cfg.cores or resources.get("CPU", 0), int(resources.get("GPU", 0)))


def _local_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    devices = Path("/proc/driver/nvidia/gpus")
    return len(list(devices.iterdir())) if devices.is_dir() else 0


def _estimate(cfg: Config, stage: Stage) -> float | None:
    """Seconds: of the last finished run of this stage or a repetition of it here, else what the file says."""
    name = cfg.repetitions[stage.name].stage
    runs = [path.parent for path in stage.folder.parent.glob(f"{name}-*/{MANIFEST_FILE}")]
    taken = [
        (manifest["ended"], float(manifest["wall_seconds"]))
        for manifest in (storage.read_json(run / MANIFEST_FILE) for run in runs)
        if manifest.get("status") == "finished" and manifest.get("job") == stage.job
    ]
    minutes = cfg.stages[name].minutes
    return max(taken)[1] if taken else None if minutes is None else minutes * 60


def _wanted(cfg: Config) -> list[Wanted]:
    """The lines of the table.

    Raises:
        ConfigError: A line is of a stage that there is not, or several lines would have one label.
    """
    lines: dict[str, Wanted] = {}
    for result in cfg.results:
        groups = grouped(cfg.repetitions, result.stage, result.mean_over)
        if not groups:
            raise ConfigError(
                f"`results` takes a figure from a stage `{result.stage}`, which there is not. "
                f"The stages are: {', '.join(cfg.stages)}."
            )
        published = result.published and Published(result.published.value, result.published.setting)
        for values, stages in groups:
            label = str(substitute(result.label, values))
            if label in lines:
                raise ConfigError(
                    f"`results` has two lines `{label}`. Give them labels of their own; `{result.stage}` is repeated over "
                    f"{', '.join(values) or 'nothing'}, which a label names as `${{...}}` or `mean_over` takes together."
                )
            lines[label] = Wanted(label, stages, result.metric, result.unit, result.scale, published)
    return list(lines.values())


def _raise_if_failed(outcomes: Mapping[str, Outcome], stages: Sequence[Stage], root: Path) -> None:
    lost = {name: outcome for name, outcome in outcomes.items() if outcome.status in ("failed", "skipped")}
    if lost:
        logs = {s.name: root / "logs" / f"{s.folder.name}.log" for s in stages}
        lines = [
            f"  - {name}: {outcome.error}" + (f"\n    log: {logs[name]}" if logs[name].is_file() else "")
            for name, outcome in lost.items()
        ]
        failed = sum(outcome.status == "failed" for outcome in lost.values())
        raise ExperimentFailed(
            f"{failed} of {len(outcomes)} stages failed, {len(lost) - failed} that need them were left out\n"
            + "\n".join(lines)
            + "\nMend the cause and give the same command again: what is done stays, and the rest goes on."
        )


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
