"""Which jobs there are. A job is a module with a `Config` class and a `main(cfg)`; a YAML file names its job."""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from typing import Any, Protocol, cast

from pydantic import ConfigDict

from eagleray.platform.config import Config, ConfigError, load_config
from eagleray.platform.imports import imports
from eagleray.platform.sections import JobConfig

JOBS = {
    "backbone.pretrain": "eagleray.jobs.backbone.pretrain",
    "gram.pretrain": "eagleray.jobs.gram.pretrain",
    "gram.finetune": "eagleray.jobs.gram.finetune",
    "gram.discriminative": "eagleray.jobs.gram.discriminative",
    "gram.evaluate": "eagleray.jobs.gram.evaluate",
    "gram.score": "eagleray.jobs.gram.score",
    "gram.generate": "eagleray.jobs.gram.generate",
    "gram.demo": "eagleray.jobs.gram.demo",
    "lrhp.train": "eagleray.jobs.lrhp.train",
    "lrhp.encode": "eagleray.jobs.lrhp.encode",
    "lrhp.evaluate": "eagleray.jobs.lrhp.evaluate",
    "lrhp.margin": "eagleray.jobs.lrhp.margin",
    "lisa.analyze": "eagleray.jobs.lisa.analyze",
    "lisa.convert": "eagleray.jobs.lisa.convert",
    "lisa.train": "eagleray.jobs.lisa.train",
    "lisa.evaluate": "eagleray.jobs.lisa.evaluate",
    "lisa.measure": "eagleray.jobs.lisa.measure",
    "nast.prepare": "eagleray.jobs.nast.prepare",
    "nast.train": "eagleray.jobs.nast.train",
    "nast.translate": "eagleray.jobs.nast.translate",
    "nast.evaluate": "eagleray.jobs.nast.evaluate",
    "nast.distill": "eagleray.jobs.nast.distill",
    "nast.text": "eagleray.jobs.nast.text",
    "rovrm.pretrain": "eagleray.jobs.rovrm.pretrain",
    "rovrm.train": "eagleray.jobs.rovrm.train",
    "rovrm.evaluate": "eagleray.jobs.rovrm.evaluate",
    "rovrm.hallucination": "eagleray.jobs.rovrm.hallucination",
    "rovrm.progressive": "eagleray.jobs.rovrm.progressive",
    "features": "eagleray.jobs.features",
    "align.sample": "eagleray.jobs.align.sample",
    "align.best_of_n": "eagleray.jobs.align.best_of_n",
    "align.policy": "eagleray.jobs.align.policy",
    "align.dpo": "eagleray.jobs.align.dpo",
    "select": "eagleray.jobs.select",
    "sweep": "eagleray.jobs.sweep",
    "experiment": "eagleray.jobs.experiment",
}
"""Job name -> module."""


class Job(Protocol):
    """What a job's module holds."""

    Config: type[JobConfig]

    def main(self, cfg: Any, /) -> Any: ...


def load_job(name: str) -> Job:
    """Import a job's module; only then are torch and Ray loaded.

    Raises:
        ConfigError: There is no such job.
    """
    if name not in JOBS:
        near = difflib.get_close_matches(name, JOBS, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ConfigError(f"There is no job `{name}`.{hint} The jobs are: {', '.join(sorted(JOBS))}.")
    with imports():
        return cast(Job, importlib.import_module(JOBS[name]))


def job_name(path: str | Path) -> str:
    """Name of the job that a config file is for.

    Raises:
        ConfigError: The file cannot be read or does not name its job.
    """
    name = load_config(_Header, path).job
    if name is None:
        raise ConfigError(
            f"{path}: the key `job` is missing; it says what to run, e.g. `job: gram.finetune`. "
            f"The jobs are: {', '.join(sorted(JOBS))}."
        )
    return name


class _Header(Config):
    """The one key that every config file has, whatever its job."""

    model_config = ConfigDict(extra="ignore")

    job: str | None = None
