"""Evaluate speech translation models side by side: quality with intervals, failures, latency.

    python -m eagleray.jobs.nast.evaluate --config configs/nast/evaluate_tiny.yaml models.nast.path=runs/nast/model

BLEU is sacrebleu's, with its signature. Latency is that of one utterance at a time, after a warm-up, features timed
apart; speed-ups are against the reference model of the same run. The run folder gets `report.json`, one JSON line an
utterance under `results/`, and plots.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table

from eagleray.jobs.nast.data import SpeechRules, SpeechSource, SyntheticSpeech
from eagleray.jobs.nast.translation import TranslatorSection, report_undecoded, translate_sets
from eagleray.models.nast.config import NastConfig
from eagleray.models.nast.manifest import Utterance
from eagleray.models.nast.metrics import (
    LENGTH_EDGES,
    REORDERING_EDGES,
    bleu,
    bleu_estimate,
    by_bucket,
    chrf,
    exact_match_estimate,
    length_ratio,
    word_error_estimate,
)
from eagleray.models.nast.plots import plot_buckets, plot_scores
from eagleray.models.nast.reordering import reordering
from eagleray.models.nast.subsampler import subsampled_length
from eagleray.models.nast.synthetic import write_corpus
from eagleray.models.nast.translator import model_class
from eagleray.models.nast.vocabulary import ctc_length, load_vocabularies
from eagleray.platform.cluster import connected
from eagleray.platform.runs import RunFolder
from eagleray.platform.scoring import Row
from eagleray.platform.sections import JobConfig

JOB = "nast.evaluate"
logger = logging.getLogger(__name__)


class EvaluationSet(SpeechRules):
    """Utterances with references."""

    sources: list[SpeechSource] = Field(default=[])
    """Where they come from."""
    synthetic: SyntheticSpeech | None = None
    """Generated recordings in their place, of the generator's test part."""

    @model_validator(mode="after")
    def _one_origin(self) -> EvaluationSet:
        if bool(self.sources) == (self.synthetic is not None):
            raise ValueError("give either `sources` or `synthetic`")
        return self


class Config(JobConfig):
    """Config of `nast.evaluate`."""

    job: Literal["nast.evaluate"] = JOB
    models: dict[str, TranslatorSection] = Field(min_length=1)
    """Models by the name they get in the report."""
    sets: dict[str, EvaluationSet] = Field(min_length=1)
    """Evaluation sets by name."""
    reference: str | None = None
    """Model whose latency the others are compared with; default: the first."""
    bootstrap: int = Field(default=1000, ge=100)
    """Bootstrap replicates of an interval."""
    latency_utterances: int = Field(default=50, ge=0)
    """Utterances of each set that are also translated one by one, for latency; 0 leaves that out."""
    seed: int = Field(default=0, ge=0)
    """Seed of the bootstrap."""

    @model_validator(mode="after")
    def _reference_is_a_model(self) -> Config:
        if self.reference is not None and self.reference not in self.models:
            raise ValueError(f"`reference` is {self.reference!r}; the models are {', '.join(self.models)}")
        return self


@dataclass(frozen=True)
class Outcome:
    """What one model made of one set."""

    rows: list[Row]
    latency: dict[str, float] | None


def main(cfg: Config) -> dict[str, Any]:
    """Translate every set with every model and write the report.

    Returns:
        The report: `sets` -> name -> `models` -> name -> figures.
    """
    with RunFolder.create(JOB, cfg).recording() as run, connected(cfg.ray):
        sets = {
            name: section.read(section.sources or [_synthesise(section, run, name)])
            for name, section in cfg.sets.items()
        }
        run.update_manifest(data_hashes={name: loaded.content_hash() for name, loaded in sets.items()})
        outcomes = _translate(cfg, {name: loaded.utterances for name, loaded in sets.items()})
        report: dict[str, Any] = {"sets": {}}
        for name, loaded in sets.items():
            report["sets"][name] = {
                **loaded.summary(),
                "models": _figures(cfg, cfg.sets[name], loaded.utterances, outcomes[name]),
            }
            _write_results(run, name, loaded.utterances, outcomes[name])
        run.write_report(report)
        _plot(run, report)
    print_table(report, Console())
    return report


def print_table(report: dict[str, Any], console: Console) -> None:
    """The main figures, one table a set; the report has the others."""
    columns = ("model", "BLEU (95 %)", "exact", "WER", "source WER", "ms", "speed-up")
    for name, figures in report["sets"].items():
        table = Table(title=f"{name}: {figures['utterances']} utterances", title_justify="left")
        for column in columns:
            table.add_column(column, justify="left" if column == "model" else "right")
        for model, values in figures["models"].items():
            score, latency, source = values["bleu"], values["latency"], values["source_wer"]
            table.add_row(
                model,
                f"{score['value']:.2f} ({score['low']:.1f} to {score['high']:.1f})",
                f"{values['exact_match']['value']:.3f}",
                f"{values['target_wer']['value']:.3f}",
                f"{source['value']:.3f}" if source else "",
                f"{latency['mean_ms']:.1f}" if latency else "",
                f"{latency['speed_up']:.2f}" if latency else "",
            )
        console.print(table)


def _synthesise(section: EvaluationSet, run: RunFolder, name: str) -> SpeechSource:
    made, folder = section.synthetic, run.data / name
    assert made is not None
    return SpeechSource(
        path=str(write_corpus(folder, utterances=made.utterances, seed=made.seed, split="test"))
    )


def _translate(cfg: Config, sets: Mapping[str, Sequence[Utterance]]) -> dict[str, dict[str, Outcome]]:
    """Set -> model -> outcome."""
    utterances = sum(len(rows) for rows in sets.values())
    logger.info("Translating %d utterances with %s.", utterances, ", ".join(cfg.models))
    translated = translate_sets(cfg.models, sets, cfg.ray)
    for name, by_model in translated.items():
        rows = next(iter(by_model.values()))  # what cannot be decoded is the same for all models
        report_undecoded(rows, skip_errors=cfg.sets[name].on_error == "skip")
    # One worker, one utterance at a time: nothing else may run beside what is timed.
    alone = {name: model.model_copy(update={"max_batch_frames": 1}) for name, model in cfg.models.items()}
    some = {name: rows[: cfg.latency_utterances] for name, rows in sets.items()}
    timed = translate_sets(alone, some, cfg.ray.model_copy(update={"num_workers": 1}))
    return {
        name: {
            model: Outcome(rows, latency_figures(timed[name][model]) if timed[name][model] else None)
            for model, rows in by_model.items()
        }
        for name, by_model in translated.items()
    }


def latency_figures(rows: Sequence[Row]) -> dict[str, float]:
    """Latency of utterances that were translated one by one; up to 20 at the start are warm-up."""
    timed = [row for row in rows[min(20, len(rows) // 4) :] if row["seconds"]]
    compute, features, audio = (
        np.array([float(row[key]) for row in timed]) for key in ("compute_s", "feature_s", "seconds")
    )
    return {
        "utterances": len(timed),
        "mean_ms": 1000 * float(compute.mean()),
        "p95_ms": 1000 * float(np.percentile(compute, 95)),
        "features_ms": 1000 * float(features.mean()),
        "real_time_factor": float(compute.sum() / audio.sum()),
    }


def _figures(
    cfg: Config, section: EvaluationSet, utterances: Sequence[Utterance], outcomes: dict[str, Outcome]
) -> dict[str, Any]:
    references = [row.target for row in utterances]
    sources = [row.source for row in utterances]
    turned = reordering(sources, references) if all(sources) else None
    reference = outcomes[cfg.reference or next(iter(outcomes))]
    options: dict[str, Any] = {"samples": cfg.bootstrap, "seed": cfg.seed}
    language = section.target_language
    figures: dict[str, Any] = {}
    for model, outcome in outcomes.items():
        texts = [str(row["text"]) for row in outcome.rows]
        heard = [str(row["transcript"]) for row in outcome.rows]

        def score(indices: list[int], texts: list[str] = texts) -> float:
            return bleu(
                [texts[i] for i in indices], [references[i] for i in indices], language=language
            ).score

        latency = dict(outcome.latency) if outcome.latency else None
        if latency and reference.latency:
            latency["speed_up"] = reference.latency["mean_ms"] / latency["mean_ms"]
        signature = bleu(texts, references, language=language).signature
        figures[model] = {
            "bleu": {
                **bleu_estimate(texts, references, language=language, **options)._asdict(),
                "signature": signature,
            },
            "chrf": dict(zip(("value", "signature"), chrf(texts, references), strict=True)),
            "exact_match": exact_match_estimate(texts, references, **options)._asdict(),
            "target_wer": word_error_estimate(texts, references, **options)._asdict(),
            "source_wer": word_error_estimate(heard, sources, **options)._asdict()
            if any(sources) and any(heard)
            else None,
            "length_ratio": length_ratio(texts, references),
            "empty_share": sum(not text for text in texts) / len(texts),
            "infeasible_share": _infeasible_share(Path(cfg.models[model].path), outcome.rows, references),
            "not_decoded": sum(bool(row["error"]) for row in outcome.rows),
            "by_length": by_bucket([len(text.split()) for text in references], LENGTH_EDGES, score),
            "by_reordering": by_bucket(turned, REORDERING_EDGES, score) if turned else None,
            "latency": latency,
        }
    return figures


def _infeasible_share(folder: Path, rows: Sequence[Row], references: Sequence[str]) -> float:
    """Share of references that are too long for CTC after the model's subsampling."""
    config_class = cast("type[NastConfig]", model_class(folder).config_class)
    strides = config_class.from_pretrained(folder).all_strides
    target, _ = load_vocabularies(folder)
    too_long = [
        ctc_length(target.encode(text)) > subsampled_length(max(1, int(row["frames"])), strides)
        for row, text in zip(rows, references, strict=True)
    ]
    return sum(too_long) / len(too_long)


def _write_results(
    run: RunFolder, name: str, utterances: Sequence[Utterance], outcomes: dict[str, Outcome]
) -> None:
    """One line an utterance: id, texts, and what each model said."""
    folder = run.path / "results"
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for i, row in enumerate(utterances):
            said = {model: outcome.rows[i] for model, outcome in outcomes.items()}
            line = {"id": row.id, "source": row.source, "target": row.target, **said}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _plot(run: RunFolder, report: dict[str, Any]) -> None:
    run.plots.mkdir(exist_ok=True)
    for name, figures in report["sets"].items():
        models = figures["models"]
        plot_scores(models, run.plots / f"{name}_scores.png", title=name)
        for key, label in (
            ("by_length", "words of the reference"),
            ("by_reordering", "Kendall tau distance"),
        ):
            if all(values[key] for values in models.values()):
                path = run.plots / f"{name}_{key}.png"
                plot_buckets({m: v[key] for m, v in models.items()}, path, title=name, label=label)


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
