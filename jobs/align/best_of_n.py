"""Best-of-n: how much better the answer is that a reward picks among n, on candidates of known quality.

    python -m eagleray.jobs.align.best_of_n --config configs/align/best_of_n_tiny.yaml

Candidates come from files: rows with a prompt and a list of answers, from `align.sample` or whatever source, with their
true scores, or with a gold model or rule that gives them. Scorers are a GRAM judge by any of its ranking methods, a
discriminative reward model, and the baselines `longest`, `first` and (always there) a random choice. Curves over n are expectations over all subsets of n candidates, with
intervals over prompts, against the bound of the KL divergence, ln n - (n - 1)/n.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from random import Random
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table

from eagleray.jobs.align.choosing import Group, Pairs, ScorerSection, graded, rewards_or_pairs
from eagleray.jobs.align.gold import GoldSection
from eagleray.models.gram.alignment import kl_best_of_n
from eagleray.models.gram.best_of_n import best_by_judge, expected_curve, sweep_up_to
from eagleray.models.gram.checks import last_number
from eagleray.models.gram.metrics import mean_estimate
from eagleray.models.gram.plots import plot_best_of_n
from eagleray.platform.cluster import connected
from eagleray.platform.config import Config as Section
from eagleray.platform.data.sources import DataError, SourceConfig, file_hashes, read_rows
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import JobConfig

JOB = "align.best_of_n"
logger = logging.getLogger(__name__)


class CandidateColumns(Section):
    """What the columns are called."""

    prompt: str = "prompt"
    """Prompt of a row."""
    candidates: str = "candidates"
    """List of its answers."""
    text: str = "text"
    """Text of an answer."""
    score: str = "score"
    """True score of an answer: a number, or true and false."""
    model: str = "model"
    """Which model wrote the answer; may be missing."""
    reference: str = "reference"
    """Reference answer of a row, for a `gold` of kind judge or last_number."""


class CandidateSet(Section):
    """Prompts with several answers of known quality."""

    source: SourceConfig
    columns: CandidateColumns = CandidateColumns()
    gold: GoldSection | None = None
    """How good the answers are, if the rows do not say so: then no column `score` is read."""
    without: list[str] = Field(default=[])
    """Models whose answers are left out, e.g. one that wins nearly always."""
    least: int = Field(default=2, ge=2)
    """Prompts with fewer answers are left out."""


class Config(JobConfig):
    """Config of `align.best_of_n`."""

    job: Literal["align.best_of_n"] = JOB
    sets: dict[str, CandidateSet] = Field(min_length=1)
    """Candidates by name."""
    scorers: dict[str, ScorerSection] = Field(min_length=1)
    """Scorers by the name they get in the report."""
    reference: str | None = None
    """Scorer that the others are compared with; default: the first."""
    draws: int = Field(default=32, ge=1)
    """Subsets drawn of a prompt for each n, where a judge ranks within the subset."""
    bootstrap: int = Field(default=1000, ge=100)
    """Bootstrap replicates of an interval."""
    seed: int = Field(default=0, ge=0)
    """Seed of the drawn subsets and of the bootstrap."""

    @model_validator(mode="after")
    def _reference_is_a_scorer(self) -> Config:
        if self.reference is not None and self.reference not in self.scorers:
            raise ValueError(
                f"`reference` is {self.reference!r}; it must be one of {', '.join(self.scorers)}"
            )
        return self


def main(cfg: Config) -> dict[str, Any]:
    """Score, draw the curves, report.

    Returns:
        The report: `sets` -> name -> `scorers` -> name -> one row an n; `random`, `oracle`, `models`.
    """
    with RunFolder.create(JOB, cfg).recording() as run, connected(cfg.ray):
        groups = {
            name: graded(load_candidates(section), section.gold, cfg.ray)
            for name, section in cfg.sets.items()
        }
        hashes = {k: v for section in cfg.sets.values() for k, v in file_hashes(section.source).items()}
        run.update_manifest(data_hashes=hashes)
        pools = {name: _pools(cfg, found) for name, found in groups.items()}
        said = _all_said(cfg, pools)
        report = {"sets": {name: _report(cfg, pools[name], said[name]) for name in groups}}
        run.write_report(report)
        run.plots.mkdir(exist_ok=True)
        for name, figures in report["sets"].items():
            plot_best_of_n(
                figures["scorers"],
                run.plots / f"{name}.png",
                random=[row["value"] for row in figures["random"]],
                oracle=[row["value"] for row in figures["oracle"]],
                title=name,
            )
    print_table(report, Console())
    return report


def load_candidates(section: CandidateSet) -> list[Group]:
    """Read a set; where a gold score is to be given, qualities are 0 so far.

    Raises:
        DataError: A row does not fit, or none is left.
    """
    columns, groups = section.columns, []
    graded = section.gold is None
    for row in read_rows(section.source):
        if isinstance(row, DataError):
            raise row
        try:
            found = [
                (
                    str(c[columns.text]),
                    float(c[columns.score]) if graded else 0.0,
                    str(c.get(columns.model, "")),
                )
                for c in row.values[columns.candidates]
            ]
            prompt = str(row.values[columns.prompt])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            wanted = f"`{columns.prompt}`, and `{columns.candidates}` with `{columns.text}`" + (
                f" and `{columns.score}`; without true scores give the set a `gold`" if graded else ""
            )
            raise DataError(row.where, f"is no row of candidates ({error!r})", f"it needs {wanted}") from None
        reference = row.values.get(columns.reference)
        if section.gold is not None and section.gold.kind in ("judge", "last_number"):
            if not isinstance(reference, str) or not reference.strip():
                reason = f"`{columns.reference}` is no text"
                raise DataError(row.where, reason, f"a `gold` of kind {section.gold.kind} compares with it")
            if section.gold.kind == "last_number" and last_number(reference) is None:
                raise DataError(row.where, f"`{columns.reference}` holds no number", f"{reference[:60]!r}")
        kept = [c for c in found if c[2] not in section.without]
        if not all(math.isfinite(score) for _, score, _ in kept):
            raise DataError(row.where, f"`{columns.score}` is not a finite number", "true scores are needed")
        if len(kept) >= section.least:
            texts, scores, models = map(list, zip(*kept, strict=True))
            groups.append(Group(prompt, texts, scores, models, str(reference or "")))
    if not groups:
        raise DataError(section.source.path, "no prompt is left", f"`least` is {section.least}")
    return groups


def print_table(report: dict[str, Any], console: Console) -> None:
    """Quality at each n, one table a set."""
    for name, figures in report["sets"].items():
        table = Table(title=f"{name}: {figures['prompts']} prompts", title_justify="left")
        table.add_column("scorer")
        for n in figures["n"]:
            table.add_column(f"n = {n}", justify="right")
        for scorer, rows in figures["scorers"].items():
            table.add_row(scorer, *(f"{r['value']:.3f} ({r['low']:.3f} to {r['high']:.3f})" for r in rows))
        for scorer in ("random", "oracle"):
            table.add_row(scorer, *(f"{value['value']:.3f}" for value in figures[scorer]))
        console.print(table)
        models = sorted(figures["models"].items(), key=lambda item: -item[1])
        if models:
            console.print("Always the same model: " + ", ".join(f"{m} {v:.3f}" for m, v in models[:3]))


def _pools(cfg: Config, groups: Sequence[Group]) -> list[Group]:
    """The candidates; a reference is none, for any scorer: all curves are over the same answers."""
    if not any(s.kind == "judge" and s.method == "reference" for s in cfg.scorers.values()):
        return list(groups)
    return [Group(g.prompt, g.answers[1:], g.qualities[1:], g.models[1:], g.answers[0]) for g in groups]


def _all_said(cfg: Config, pools: dict[str, list[Group]]) -> dict[str, dict[str, Any]]:
    """Set -> scorer -> what it says about each prompt; one pass of a scorer over all sets."""
    together = [pool for found in pools.values() for pool in found]
    said: dict[str, dict[str, Any]] = {name: {} for name in pools}
    for scorer, section in cfg.scorers.items():
        logger.info("Choosing with %s.", scorer)
        verdicts = iter(rewards_or_pairs(section, together, cfg.ray))
        for name, found in pools.items():
            said[name][scorer] = [next(verdicts) for _ in found]
    return said


def _report(cfg: Config, pools: Sequence[Group], said: dict[str, Any]) -> dict[str, Any]:
    sweep = sweep_up_to(min(len(pool.answers) for pool in pools))
    qualities = [pool.qualities for pool in pools]
    picked: dict[str, np.ndarray] = {}
    proxies: dict[str, list[float]] = {}
    for name, verdicts in said.items():
        if isinstance(verdicts[0], dict):
            picked[name] = _judged(cfg.scorers[name], verdicts, pools, sweep, cfg)
            continue
        picked[name] = expected_curve(verdicts, qualities, sweep)
        proxies[name] = expected_curve(verdicts, verdicts, sweep).mean(0).tolist()
    options: dict[str, Any] = {"samples": cfg.bootstrap, "seed": cfg.seed}
    first = picked[cfg.reference or next(iter(picked))]
    scorers = {
        name: [
            {
                "n": n,
                "kl": kl_best_of_n(n),
                **asdict(mean_estimate(column_P, **options)),
                **({"reward": proxies[name][i]} if name in proxies else {}),
                "difference": asdict(mean_estimate(column_P - first[:, i], **options)),
            }
            for i, (n, column_P) in enumerate(zip(sweep, found_PK.T, strict=True))
        ]
        for name, found_PK in picked.items()
    }
    random_P = [float(np.mean(g.qualities)) for g in pools]
    oracle_PK = expected_curve(qualities, qualities, sweep)
    return {
        "prompts": len(pools),
        "n": sweep,
        "scorers": scorers,
        "random": [asdict(mean_estimate(random_P, **options))] * len(sweep),
        "oracle": [asdict(mean_estimate(column_P, **options)) for column_P in oracle_PK.T],
        "models": _by_model(pools),
    }


def _by_model(groups: Sequence[Group]) -> dict[str, float]:
    """Mean quality of each model's answers, of those that answered every prompt."""
    found: dict[str, list[float]] = {}
    for group in groups:
        for model, quality in zip(group.models, group.qualities, strict=True):
            if model:
                found.setdefault(model, []).append(quality)
    return {m: float(np.mean(scores)) for m, scores in found.items() if len(scores) == len(groups)}


def _judged(
    section: ScorerSection, pairs: Sequence[Pairs], pools: Sequence[Group], sweep: Sequence[int], cfg: Config
) -> np.ndarray:
    """Quality of a pairwise judge's choice [prompts, n]."""
    assert section.method != "reference"
    rows = []
    for number, (known, pool) in enumerate(zip(pairs, pools, strict=True)):
        rng = Random(f"{cfg.seed} {number}")
        options: dict[str, Any] = {"method": section.method, "draws": cfg.draws, "rng": rng}
        # One answer drawn is any answer: no lots needed.
        rows.append(
            [
                float(np.mean(pool.qualities))
                if n == 1
                else best_by_judge(known, pool.qualities, n, **options)
                for n in sweep
            ]
        )
    return np.array(rows)


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
