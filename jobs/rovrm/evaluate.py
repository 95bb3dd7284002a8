"""Evaluate visual reward models and simple baselines on visual preference files, side by side.

    python -m eagleray.jobs.rovrm.evaluate --config configs/rovrm/evaluate_tiny.yaml

Accuracy overall, by source and by group, calibration, length correlation and best-of-n, each scorer with a paired
difference to the reference scorer. The run folder gets `report.json`, the rewards of every answer under `results/`,
and plots.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from rich.console import Console
from rich.table import Table

from eagleray.jobs.rovrm.data import ImageSection, Sample, VisualSource, load_sources
from eagleray.models.gram.metrics import paired_difference
from eagleray.models.gram.plots import plot_best_of_n, plot_sets
from eagleray.models.rovrm.best_of_n import LEAST_CANDIDATES, best_of_n_curve, group_candidates
from eagleray.models.rovrm.images import ImageLimits
from eagleray.models.rovrm.metrics import RankedPair, evaluate_pairs, ranked_pairs
from eagleray.models.rovrm.scoring import TooLongError, VisualScorer
from eagleray.platform.cluster import connected
from eagleray.platform.config import Config as Section
from eagleray.platform.config import ConfigError
from eagleray.platform.runs import RunFolder
from eagleray.platform.scoring import Row, Score, map_with_models
from eagleray.platform.sections import JobConfig

JOB = "rovrm.evaluate"
logger = logging.getLogger(__name__)

Rewards = list[list[float]]
"""Of each sample, the reward of each answer."""


class ScorerSection(Section):
    """One scorer of answers."""

    kind: Literal["model", "longer_answer"] = "model"
    """A visual reward model, or the baseline that rewards length."""
    path: str | None = None
    """Model folder, for `model`."""
    blind: bool = False
    """Hide the picture from the model: what it reaches then, it knows without seeing."""

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> ScorerSection:
        if (self.kind == "model") != (self.path is not None):
            raise ValueError("a scorer of kind `model` needs `path`, and only that kind takes it")
        return self

    @field_validator("path")
    @classmethod
    def _local_folders_are_absolute(cls, path: str | None) -> str | None:
        return None if path is None else str(Path(path).expanduser().absolute())


class EvaluationSet(Section):
    """Samples to score."""

    sources: list[VisualSource] = Field(min_length=1)
    """Where they come from; accuracy is also given for each."""
    best_of_n: bool = False
    """Also draw a best-of-n curve: chosen answers about one picture count as good, rejected ones as bad."""


class Config(JobConfig):
    """Config of `rovrm.evaluate`."""

    job: Literal["rovrm.evaluate"] = JOB
    scorers: dict[str, ScorerSection] = Field(min_length=1)
    """Scorers by the name they get in the report."""
    sets: dict[str, EvaluationSet] = Field(min_length=1)
    """Evaluation sets by name."""
    images: ImageSection = ImageSection()
    reference: str | None = None
    """Scorer that the others are compared with; default: the first."""
    bootstrap: int = Field(default=1000, ge=100)
    """Bootstrap replicates of an interval."""
    seed: int = Field(default=0, ge=0)
    """Seed of the bootstrap."""

    @model_validator(mode="after")
    def _reference_is_a_scorer(self) -> Config:
        if self.reference is not None and self.reference not in self.scorers:
            raise ValueError(
                f"`reference` is {self.reference!r}; it must be one of {', '.join(self.scorers)}"
            )
        return self


def main(cfg: Config) -> dict[str, Any]:
    """Score every set with every scorer and write the report.

    Returns:
        The report: `sets` -> name -> `scorers` -> name -> figures.

    Raises:
        DataError: A row does not fit.
        ConfigError: A set is to have a best-of-n curve, and has too few answers about any picture.
    """
    with RunFolder.create(JOB, cfg).recording() as run, connected(cfg.ray):
        loaded = {name: load_sources(section.sources, cfg.images) for name, section in cfg.sets.items()}
        run.update_manifest(data_hashes={k: v for found in loaded.values() for k, v in found.hashes.items()})
        sets = {name: found.samples for name, found in loaded.items()}
        _check_best_of_n(cfg, sets)
        rewards = _all_rewards(cfg, sets)
        report = {
            "sets": {
                name: _report(cfg, name, samples, rewards[name]) | {"data": loaded[name].counts}
                for name, samples in sets.items()
            }
        }
        _write_results(run, sets, rewards)
        run.write_report(report)
        plot_sets(report["sets"], run.plots)
        for name in (name for name, section in cfg.sets.items() if section.best_of_n):
            curves = _curves(report["sets"][name])
            rows = next(iter(curves.values()))
            plot_best_of_n(
                curves,
                run.plots / f"{name}_best_of_n.png",
                random=[row["random"] for row in rows],
                oracle=[row["oracle"] for row in rows],
                title=f"{name}, best of n",
            )
    print_table(report, Console())
    return report


def print_table(report: dict[str, Any], console: Console) -> None:
    """Accuracy with its interval and the main other figures, one table a set."""
    for name, figures in report["sets"].items():
        title = f"{name}: {figures['pairs']} pairs" + (
            f", {len(figures['too_long'])} too long" if figures["too_long"] else ""
        )
        table = Table(title=title, title_justify="left")
        for column in (
            "scorer",
            "accuracy",
            "95 % interval",
            "difference to reference",
            "macro",
            "ECE",
            "length",
        ):
            table.add_column(column, justify="left" if column == "scorer" else "right")
        for scorer, values in figures["scorers"].items():
            accuracy, difference = values["accuracy"], values.get("difference")
            correlation = values["length_correlation"]
            table.add_row(
                scorer,
                f"{accuracy['value']:.3f}",
                f"{accuracy['low']:.3f} to {accuracy['high']:.3f}",
                f"{difference['value']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})"
                if difference
                else "",
                f"{values['macro_accuracy']:.3f}",
                f"{values['ece']:.3f}",
                "" if correlation is None else f"{correlation:+.2f}",
            )
        console.print(table)
        curves = _curves(figures)
        if curves:
            rows = next(iter(curves.values()))
            table = Table(title=f"{name}: share of good answers, best of n", title_justify="left")
            table.add_column("scorer")
            for row in rows:
                table.add_column(f"n = {row['n']}", justify="right")
            for scorer, found in curves.items():
                table.add_row(
                    scorer, *(f"{r['value']:.3f} ({r['low']:.3f} to {r['high']:.3f})" for r in found)
                )
            for chance in ("random", "oracle"):
                table.add_row(chance, *(f"{row[chance]:.3f}" for row in rows))
            console.print(table)


def _curves(figures: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Best-of-n curves of a set by scorer; empty where none was asked for."""
    return {name: found["best_of_n"] for name, found in figures["scorers"].items() if "best_of_n" in found}


def build_scorer(path: str, limits: dict[str, Any]) -> Score:
    """A scorer with a model, for the workers: rows with prompt, answers (JSON) and picture to their rewards (JSON).

    A sample that does not fit gets null.
    """
    scorer = VisualScorer.from_pretrained(path, limits=ImageLimits(**limits))

    def score(rows: list[Row]) -> list[Row]:
        spans, items = [], []
        for row in rows:
            image = bytes(row["image"]) or None
            try:
                prepared = scorer.prepare(row["prompt"], json.loads(row["answers"]), image)
            except TooLongError:
                prepared = []
            spans.append((len(items), len(items) + len(prepared)))
            items += prepared
        found = scorer.rewards(items)
        return [{"rewards": json.dumps(found[start:end] or None)} for start, end in spans]

    return score


def _check_best_of_n(cfg: Config, sets: dict[str, list[Sample]]) -> None:
    """Before anything is scored."""
    for name, samples in sets.items():
        records = [sample.record for sample in samples]
        if cfg.sets[name].best_of_n and not group_candidates(
            records, [[0.0] * len(r.responses) for r in records]
        ):
            raise ConfigError(
                f"`sets.{name}.best_of_n` is true, but no picture of the set has {LEAST_CANDIDATES} different answers to one prompt. "
                "Leave it out, or give rows that share their picture."
            )


def _all_rewards(
    cfg: Config, sets: dict[str, list[Sample]]
) -> dict[str, dict[str, list[list[float] | None]]]:
    """Set -> scorer -> rewards of each sample, None where it does not fit; one pass of a model over all sets."""
    keys = [(name, i) for name, samples in sets.items() for i in range(len(samples))]
    rewards: dict[str, dict[str, list[list[float] | None]]] = {name: {} for name in sets}
    for scorer, found in _rewards(cfg, [sets[name][i] for name, i in keys]).items():
        for (name, _), values in zip(keys, found, strict=True):
            rewards[name].setdefault(scorer, []).append(values)
    return rewards


def _rewards(cfg: Config, samples: Sequence[Sample]) -> dict[str, list[list[float] | None]]:
    """What each scorer finds, in the order of the config."""
    logger.info("Scoring %d samples with %s.", len(samples), ", ".join(cfg.scorers))
    limits = cfg.images.model_dump()
    models = {
        name: {"path": section.path, "limits": limits}
        for name, section in cfg.scorers.items()
        if section.path is not None
    }
    rows = {name: [_row(s, blind=cfg.scorers[name].blind) for s in samples] for name in models}
    modelled = map_with_models(build_scorer, models, rows, cfg.ray)
    return {
        name: [json.loads(row["rewards"]) for row in modelled[name]]
        if name in models
        else [[math.log(1 + len(answer)) for answer in s.record.responses] for s in samples]
        for name in cfg.scorers
    }


def _row(sample: Sample, *, blind: bool) -> Row:
    answers = json.dumps(sample.record.responses)
    return {
        "prompt": sample.record.prompt,
        "answers": answers,
        "image": b"" if blind else sample.image or b"",
    }


def _report(
    cfg: Config, name: str, samples: list[Sample], rewards: dict[str, list[list[float] | None]]
) -> dict[str, Any]:
    """Figures on the samples that every scorer could take; the ids of the others are listed."""
    fits = [all(found[i] is not None for found in rewards.values()) for i in range(len(samples))]
    kept = [s for s, fit in zip(samples, fits, strict=True) if fit]
    if not kept:
        raise ValueError(f"Set {name!r}: no sample fits into all models; raise their `max_length`.")
    records, sources = [s.record for s in kept], [s.source for s in kept]
    values: dict[str, Rewards] = {
        scorer: [v for v, fit in zip(found, fits, strict=True) if fit and v is not None]
        for scorer, found in rewards.items()
    }
    pairs = {scorer: ranked_pairs(records, sources, found) for scorer, found in values.items()}
    reference = pairs[cfg.reference or next(iter(cfg.scorers))]
    scorers: dict[str, Any] = {}
    for scorer, found in pairs.items():
        figures = evaluate_pairs(found, samples=cfg.bootstrap, seed=cfg.seed)
        if found is not reference:
            figures["difference"] = asdict(
                paired_difference(
                    _right(found),
                    _right(reference),
                    clusters=[pair.cluster for pair in found],
                    samples=cfg.bootstrap,
                    seed=cfg.seed,
                )
            )
        if cfg.sets[name].best_of_n:
            groups = group_candidates(records, values[scorer])
            figures["best_of_n"] = best_of_n_curve(groups, samples=cfg.bootstrap, seed=cfg.seed)
        scorers[scorer] = figures
    return {
        "samples": len(kept),
        "pairs": len(reference),
        "too_long": [s.record.id for s, fit in zip(samples, fits, strict=True) if not fit],
        "reference": cfg.reference or next(iter(cfg.scorers)),
        "scorers": scorers,
    }


def _right(pairs: Sequence[RankedPair]) -> list[bool]:
    return [pair.reward_better > pair.reward_worse for pair in pairs]


def _write_results(
    run: RunFolder,
    sets: dict[str, list[Sample]],
    rewards: dict[str, dict[str, list[list[float] | None]]],
) -> None:
    """One line a sample: its texts, and for each scorer the rewards of the answers."""
    folder = run.path / "results"
    folder.mkdir(exist_ok=True)
    for name, samples in sets.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for i, sample in enumerate(samples):
                row = {
                    **asdict(sample.record),
                    "source": sample.source,
                    "rewards": {scorer: found[i] for scorer, found in rewards[name].items()},
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
