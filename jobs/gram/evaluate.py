"""Evaluate judges, reward models and simple baselines on preference files and benchmarks, side by side.

    python -m eagleray.jobs.gram.evaluate --config configs/gram/evaluate_tiny.yaml

Every figure has a bootstrap interval, and every scorer a paired difference to the reference scorer. The run
folder gets `report.json`, one JSON line a pair and scorer under `results/`, and plots.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table

from eagleray.models.gram.baselines import BagOfWords, LongerAnswer
from eagleray.models.gram.benchmark_intervals import benchmark_intervals
from eagleray.models.gram.benchmarks import (
    BENCHMARKS,
    BenchmarkPair,
    benchmark_metrics,
    check_benchmark,
    read_benchmark,
)
from eagleray.models.gram.discriminative import DiscriminativeScorer
from eagleray.models.gram.judge import Comparison, Judge, Pair
from eagleray.models.gram.metrics import evaluate_comparisons, paired_difference
from eagleray.models.gram.plots import plot_sets
from eagleray.models.gram.prompts import shuffled_order
from eagleray.platform.cluster import connected
from eagleray.platform.config import Config as Section
from eagleray.platform.data.preferences import PreferenceMixture, load_preferences
from eagleray.platform.data.sources import DataError, SourceConfig, file_hashes, read_rows
from eagleray.platform.runs import RunFolder
from eagleray.platform.scoring import Row, Score, map_with_models
from eagleray.platform.sections import JobConfig, ModelPath

JOB = "gram.evaluate"
logger = logging.getLogger(__name__)


class ScorerSection(Section):
    """One scorer of pairs."""

    kind: Literal["judge", "discriminative", "longer_answer", "bag_of_words"]
    """`judge` (GRAM, or any causal LM), `discriminative`, or one of the baselines without a model."""
    path: ModelPath | None = None
    """Model folder or hub name, for `judge` and `discriminative`."""
    train: PreferenceMixture | None = None
    """Pairs that a `bag_of_words` learns from."""
    dev: PreferenceMixture | None = None
    """Pairs that a `bag_of_words` chooses its regularisation by."""
    options: dict[str, Any] = Field(default={})
    """Further settings of a judge, e.g. `swap_average: logit` or `template: official.yaml`."""

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> ScorerSection:
        if self.kind in ("judge", "discriminative") and self.path is None:
            raise ValueError(f"a scorer of kind {self.kind} needs `path`")
        if self.kind == "bag_of_words" and (self.train is None or self.dev is None):
            raise ValueError("a scorer of kind bag_of_words needs `train` and `dev`")
        return self


class EvaluationSet(Section):
    """Pairs to judge: a preference file, or a benchmark in its own format."""

    pairs: PreferenceMixture | None = None
    """Preference data."""
    benchmark: str | None = None
    """Name of a benchmark, which says how rows are read and which metrics it has."""
    source: SourceConfig | None = None
    """File of the benchmark."""
    group: str | None = None
    """Category or subset of the rows, for files that do not name it."""
    options: dict[str, Any] = Field(default={})
    """Of the benchmark's metrics, e.g. `reasoning_weighting: pooled`."""

    @model_validator(mode="after")
    def _one_kind(self) -> EvaluationSet:
        if (self.pairs is None) == (self.benchmark is None):
            raise ValueError("give either `pairs` or `benchmark`")
        if self.benchmark is not None and (self.benchmark not in BENCHMARKS or self.source is None):
            raise ValueError(f"`benchmark` must be one of {', '.join(BENCHMARKS)}, with its file as `source`")
        return self


class Config(JobConfig):
    """Config of `gram.evaluate`."""

    job: Literal["gram.evaluate"] = JOB
    scorers: dict[str, ScorerSection] = Field(min_length=1)
    """Scorers by the name they get in the report."""
    sets: dict[str, EvaluationSet] = Field(min_length=1)
    """Evaluation sets by name."""
    reference: str | None = None
    """Scorer that the others are compared with; default: the first."""
    bootstrap: int = Field(default=1000, ge=100)
    """Bootstrap replicates of an interval."""
    seed: int = Field(default=0, ge=0)
    """Seed of the bootstrap."""


@dataclass(frozen=True)
class LoadedSet:
    """Pairs with the better answer first, and what the report needs to know of them."""

    pairs: list[Pair]
    ids: list[str]
    hashes: dict[str, str]
    benchmark_pairs: list[BenchmarkPair] = field(default_factory=list)


def main(cfg: Config) -> dict[str, Any]:
    """Score every set with every scorer and write the report.

    Returns:
        The report: `sets` -> name -> `scorers` -> name -> figures.
    """
    with RunFolder.create(JOB, cfg).recording() as run, connected(cfg.ray):
        sets = {name: _load_set(section) for name, section in cfg.sets.items()}
        run.update_manifest(data_hashes={k: v for loaded in sets.values() for k, v in loaded.hashes.items()})
        comparisons = _compare_sets(cfg, sets)
        report = {"sets": {name: _report(cfg, name, sets[name], comparisons[name]) for name in sets}}
        _write_results(run, sets, comparisons)
        run.write_report(report)
        plot_sets(report["sets"], run.plots)
    print_table(report, Console())
    return report


def print_table(report: dict[str, Any], console: Console) -> None:
    """Accuracy with its interval and the main other figures, one table a set."""
    for name, figures in report["sets"].items():
        table = Table(title=f"{name}: {figures['pairs']} pairs", title_justify="left")
        for column in (
            "scorer",
            "accuracy",
            "95 % interval",
            "difference to reference",
            "ECE",
            "Brier",
            "consistency",
        ):
            table.add_column(column, justify="left" if column == "scorer" else "right")
        for scorer, values in figures["scorers"].items():
            accuracy, difference = values["accuracy"], values.get("difference")
            table.add_row(
                scorer,
                f"{accuracy['value']:.3f}",
                f"{accuracy['low']:.3f} to {accuracy['high']:.3f}",
                f"{difference['value']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})"
                if difference
                else "",
                f"{values['ece']:.3f}",
                f"{values['brier']['value']:.3f}",
                f"{values['consistency']['value']:.3f}",
            )
        console.print(table)


def build_scorer(kind: str, path: str, options: dict[str, Any]) -> Score:
    """A scorer with a model, for the workers: rows with prompt, first and second to columns of a `Comparison`."""
    loader = {"judge": Judge, "discriminative": DiscriminativeScorer}[kind]
    scorer = loader.from_pretrained(path, **options)

    def score(rows: list[Row]) -> list[Row]:
        results = scorer.compare([(row["prompt"], row["first"], row["second"]) for row in rows])
        return [asdict(result) for result in results]

    return score


def _compare_sets(cfg: Config, sets: dict[str, LoadedSet]) -> dict[str, dict[str, list[Comparison]]]:
    """Set -> scorer -> comparisons with the chosen answer first; one pass of each scorer over all pairs.

    The chosen answer is shown first in a seeded half of the pairs: with `swap_average: none` a judge that always
    prefers slot A would otherwise be always right.
    """
    keys = [(name, i) for name, loaded in sets.items() for i in range(len(loaded.pairs))]
    flipped = [shuffled_order(cfg.seed, f"{name}/{sets[name].ids[i]}") for name, i in keys]
    pairs = []
    for (name, i), flip in zip(keys, flipped, strict=True):
        prompt, chosen, rejected = sets[name].pairs[i]
        pairs.append((prompt, rejected, chosen) if flip else (prompt, chosen, rejected))
    comparisons: dict[str, dict[str, list[Comparison]]] = {name: {} for name in sets}
    for scorer, found in _compare(cfg, pairs).items():
        for (name, _), flip, result in zip(keys, flipped, found, strict=True):
            comparisons[name].setdefault(scorer, []).append(result.swapped() if flip else result)
    return comparisons


def _compare(cfg: Config, pairs: Sequence[Pair]) -> dict[str, list[Comparison]]:
    """What each scorer finds, in the order of the config."""
    logger.info("Scoring %d pairs with %s.", len(pairs), ", ".join(cfg.scorers))
    models = {
        name: {"kind": section.kind, "path": section.path, "options": section.options}
        for name, section in cfg.scorers.items()
        if section.kind in ("judge", "discriminative")
    }
    rows = [{"prompt": prompt, "first": first, "second": second} for prompt, first, second in pairs]
    modelled = map_with_models(build_scorer, models, dict.fromkeys(models, rows), cfg.ray)
    return {
        name: [Comparison(**row) for row in modelled[name]] if name in models else _by_rule(section, pairs)
        for name, section in cfg.scorers.items()
    }


def _by_rule(section: ScorerSection, pairs: Sequence[Pair]) -> list[Comparison]:
    if section.kind == "longer_answer":
        return LongerAnswer().compare(pairs)
    assert section.train and section.dev
    parts = [load_preferences(data)[0] for data in (section.train, section.dev)]
    train, dev = ([(p.prompt_text, p.chosen, p.rejected) for p in part] for part in parts)
    return BagOfWords().fit(train, dev).compare(pairs)


def _load_set(section: EvaluationSet) -> LoadedSet:
    if section.pairs is not None:
        preferences, report = load_preferences(section.pairs)
        pairs = [(p.prompt_text, p.chosen, p.rejected) for p in preferences]
        return LoadedSet(pairs, [p.id for p in preferences], report.hashes)
    assert section.benchmark and section.source
    found: list[BenchmarkPair] = []
    for row in read_rows(section.source):
        if isinstance(row, DataError):
            raise row
        try:
            found += read_benchmark(section.benchmark, [row.values], group=section.group)
        except ValueError as error:
            raise DataError(row.where, f"not a row of {section.benchmark}", str(error)) from error
    check_benchmark(section.benchmark, found)
    pairs = [(p.prompt, p.chosen, p.rejected) for p in found]
    return LoadedSet(pairs, [p.id for p in found], file_hashes(section.source), found)


def _report(cfg: Config, name: str, loaded: LoadedSet, found: dict[str, list[Comparison]]) -> dict[str, Any]:
    section = cfg.sets[name]
    prompts = [prompt for prompt, _, _ in loaded.pairs]
    gaps = [len(first) - len(second) for _, first, second in loaded.pairs]
    reference = cfg.reference or next(iter(cfg.scorers))
    options: dict[str, Any] = {"samples": cfg.bootstrap, "seed": cfg.seed}
    scorers: dict[str, Any] = {}
    for scorer, comparisons in found.items():
        figures = evaluate_comparisons(comparisons, prompts=prompts, length_gaps=gaps, **options)
        if section.benchmark is not None:
            benchmark = (section.benchmark, loaded.benchmark_pairs, comparisons)
            figures["benchmark"] = benchmark_metrics(*benchmark, **section.options)
            figures["benchmark"]["intervals"] = benchmark_intervals(*benchmark, **section.options, **options)
        if scorer != reference:
            right, other = ([c.p_a > 0.5 for c in row] for row in (comparisons, found[reference]))
            figures["difference"] = asdict(paired_difference(right, other, clusters=prompts, **options))
        scorers[scorer] = figures
    return {"pairs": len(prompts), "prompts": len(set(prompts)), "reference": reference, "scorers": scorers}


def _write_results(
    run: RunFolder, sets: dict[str, LoadedSet], comparisons: dict[str, dict[str, list[Comparison]]]
) -> None:
    """One line a pair: id, and for each scorer the probability of the chosen answer in both orders."""
    folder = run.path / "results"
    folder.mkdir(exist_ok=True)
    for name, loaded in sets.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for i, (pair_id, (prompt, chosen, rejected)) in enumerate(
                zip(loaded.ids, loaded.pairs, strict=True)
            ):
                row: dict[str, Any] = {
                    "id": pair_id,
                    "prompt": prompt,
                    "chosen": chosen,
                    "rejected": rejected,
                }
                for scorer, found in comparisons[name].items():
                    row[scorer] = {
                        "score_chosen": found[i].p_a,
                        "score_rejected": found[i].p_b,
                        "correct": found[i].p_a > 0.5,
                        **asdict(found[i]),
                    }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
