"""Predict how much better the chosen answer is, from representations and a few rated pairs (spec 6).

    python -m eagleray.jobs.lrhp.margin --config configs/lrhp/margin_tiny.yaml store=...

Predictors are fitted on the rated pairs of `data` and compared with baselines on held-out prompts; every figure has a
bootstrap interval. The run folder gets `report.json`, plots, `predictor/` (for `eagleray serve`), and `margins.jsonl`: the
pairs with a column `margin`, which `gram.discriminative` takes as `margins` and trl's RewardTrainer as its data.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from rich.console import Console
from rich.table import Table

from eagleray.jobs.lrhp.data import PairSet, without_prompts_of
from eagleray.jobs.lrhp.margin_baselines import baseline_features
from eagleray.models.lrhp.margins import (
    ALPHAS,
    MarginPredictor,
    fit_mlp,
    fit_ridge,
    margin_labels,
)
from eagleray.models.lrhp.metrics import MARGIN_METRICS, margin_metrics, margin_report
from eagleray.models.lrhp.plots import plot_budgets, plot_predictions, plot_spearman
from eagleray.models.lrhp.store import Representations, RepresentationStore
from eagleray.models.selection.store import text_hash
from eagleray.platform.config import Config as Section
from eagleray.platform.data.margins import read_margins
from eagleray.platform.data.preferences import Preference, split_by_prompt
from eagleray.platform.data.sources import SourceConfig, file_hashes
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import JobConfig

JOB = "lrhp.margin"
logger = logging.getLogger(__name__)


class RidgeSection(Section):
    """Ridge regression on standardised features."""

    alphas: tuple[float, ...] = ALPHAS
    """Penalties among which cross-validation chooses."""
    folds: int = Field(default=5, ge=2)
    """Parts of the cross-validation."""


class MlpSection(Section):
    """One hidden layer with ReLU and dropout; softplus at the end."""

    hidden: int = Field(default=256, ge=1)
    """Width of the hidden layer."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout on the hidden layer."""
    epochs: int = Field(default=200, ge=1)
    """Passes over the rated pairs."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of Adam."""


class StoreSection(Section):
    """A store of representations."""

    path: str
    """Its folder; it must hold every rated pair."""


class Config(JobConfig):
    """Config of `lrhp.margin`."""

    job: Literal["lrhp.margin"] = JOB
    store: str
    """Store of representations; it must hold every rated pair."""
    order: Literal["canonical", "both", "diff"] | None = None
    """Which representations; may be left out if the store holds one order only."""
    data: PairSet
    """Rated pairs: their margins, or differences of scores, are the labels."""
    labels: SourceConfig | None = None
    """Rows with `id` and `margin` in place of the margins in `data`; pairs of `data` without one are not used."""
    max_gap: float = Field(gt=0)
    """Largest margin there can be, e.g. 9 on a scale from 1 to 10; labels are margins divided by it."""
    test: PairSet | None = None
    """Rated pairs to evaluate on; default: `test_fraction` of the prompts of `data`."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of the prompts that is held out if `test` is not given."""
    predictor: Literal["ridge", "mlp"] = "ridge"
    """Which predictor is saved and writes the margins; both are evaluated."""
    ridge: RidgeSection = RidgeSection()
    mlp: MlpSection = MlpSection()
    reward_model: str | None = None
    """Discriminative reward model for the baseline |r_w − r_l|."""
    stores: dict[str, StoreSection] = Field(default={})
    """Further stores as baselines by name: of an untrained backbone, or of any sentence encoder in this format."""
    predict: PairSet | None = None
    """Pairs to write margins for, rated or not; default: those of `data` and `test`."""
    budgets: list[int] = Field(default=[])
    """Numbers of rated pairs to fit on for the curve of label budgets, e.g. [50, 100, 500]."""
    bootstrap: int = Field(default=1000, ge=100)
    """Bootstrap replicates of an interval."""
    seed: int = Field(default=0, ge=0)
    """Seed of cross-validation, MLP, budgets and bootstrap."""


class RatedPairs:
    """Pairs with labels in [0, 1]; a negative margin (label and rating disagree) has been dropped."""

    def __init__(self, pairs: list[Preference], margins: dict[str, float], max_gap: float) -> None:
        rated = [pair for pair in pairs if pair.id in margins]
        if not rated:
            raise ValueError(
                "No pair has a margin: give columns with margins or scores, or a file as `labels`."
            )
        ids = [pair.id for pair in rated]
        self.y_N, rows = margin_labels(ids, np.array([margins[i] for i in ids]), max_gap=max_gap)
        self.pairs = [rated[row] for row in rows]
        self.dropped = len(rated) - len(self.pairs)
        self.ids = [pair.id for pair in self.pairs]
        self.prompts = [text_hash(pair.prompt_text) for pair in self.pairs]


def main(cfg: Config) -> dict[str, Any]:
    """Fit, compare, predict, write.

    Returns:
        The report: `predictors` -> name -> metric -> value and interval, baselines among them.
    """
    with RunFolder.create(JOB, cfg).recording() as run:
        store = RepresentationStore(Path(cfg.store).expanduser()).read(cfg.order)
        train, test, counts = _load(cfg, run)
        x_train, x_test = (store.h_ND[store.rows_of(part.ids)] for part in (train, test))
        about = {"model_hash": store.model_hash, "order": store.order, "max_gap": cfg.max_gap}
        fitted = {
            name: _fit(name, x_train, train.y_N, cfg, about | {"pairs": len(train.ids)})
            for name in ("ridge", "mlp")
        }
        predictions = {name: predictor.predict(x_test) for name, predictor in fitted.items()}
        predictions |= _baselines(cfg, train, test)
        options: dict[str, Any] = {"clusters": test.prompts, "samples": cfg.bootstrap, "seed": cfg.seed}
        report = {
            "model_hash": store.model_hash,
            "order": store.order,
            "pairs": counts,
            "alpha": fitted["ridge"].about["alpha"],
            "predictors": {
                name: margin_report(found, test.y_N, **options) for name, found in predictions.items()
            },
            "budgets": _budgets(cfg, x_train, train.y_N, x_test, test.y_N),
        }
        fitted[cfg.predictor].save(run.path / "predictor")
        report["margins"] = _write_margins(
            cfg, run, store, fitted[cfg.predictor], [*train.pairs, *test.pairs]
        )
        run.write_report(report)
        _plot(run, report, predictions[cfg.predictor], test.y_N)
    print_table(report, Console())
    return report


def print_table(report: dict[str, Any], console: Console) -> None:
    """One line a predictor or baseline, with intervals."""
    table = Table(title=f"margins: {report['pairs']['test']} test pairs", title_justify="left")
    table.add_column("predictor")
    for metric in MARGIN_METRICS:
        table.add_column(metric, justify="right")
    for name, figures in report["predictors"].items():
        cells = (figures[m] for m in MARGIN_METRICS)
        table.add_row(name, *(f"{c['value']:.3f} ({c['low']:.3f} to {c['high']:.3f})" for c in cells))
    console.print(table)


def _load(cfg: Config, run: RunFolder) -> tuple[RatedPairs, RatedPairs, dict[str, int]]:
    loaded = cfg.data.load(keep_ties=True)
    hashes, pairs = dict(loaded.hashes), loaded.pairs
    if cfg.test is None:
        pairs, held_out = split_by_prompt(pairs, fraction=cfg.test_fraction, seed=cfg.seed)
        overlap = 0
    else:
        others = cfg.test.load(keep_ties=True)
        hashes, held_out = hashes | others.hashes, others.pairs
        pairs, overlap = without_prompts_of(pairs, held_out)
    margins = {pair.id: pair.margin for pair in [*pairs, *held_out] if pair.margin is not None}
    if cfg.labels is not None:
        hashes |= file_hashes(cfg.labels)
        margins = read_margins(cfg.labels)
    run.update_manifest(data_hashes=hashes)
    train, test = (RatedPairs(part, margins, cfg.max_gap) for part in (pairs, held_out))
    counts = {"train": len(train.ids), "test": len(test.ids), "prompt is a test prompt": overlap}
    counts |= {
        "without a margin": len(pairs) + len(held_out) - sum(len(p.ids) + p.dropped for p in (train, test))
    }
    return train, test, counts | {"negative margin": train.dropped + test.dropped}


def _fit(kind: str, x_ND: np.ndarray, y_N: np.ndarray, cfg: Config, about: dict[str, Any]) -> MarginPredictor:
    if kind == "mlp":
        return fit_mlp(x_ND, y_N, **cfg.mlp.model_dump(), seed=cfg.seed, about=about)
    return fit_ridge(x_ND, y_N, **cfg.ridge.model_dump(), seed=cfg.seed, about=about)


def _baselines(cfg: Config, train: RatedPairs, test: RatedPairs) -> dict[str, np.ndarray]:
    """Predictions on the test pairs, each by the same ridge on other features."""
    predictions = {"constant": np.full(len(test.ids), train.y_N.mean())}
    features = baseline_features(
        train.pairs,
        test.pairs,
        reward_model=cfg.reward_model,
        stores={name: section.path for name, section in cfg.stores.items()},
        order=cfg.order,
        ray=cfg.ray,
    )
    for name, (x_train, x_test) in features.items():
        predictions[name] = _fit("ridge", x_train, train.y_N, cfg, {}).predict(x_test)
    return predictions


def _budgets(
    cfg: Config, x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray
) -> dict[int, dict[str, dict[str, float]]]:
    """Figures of both predictors when only so many rated pairs are known, drawn at random."""
    shuffled = np.random.default_rng(cfg.seed).permutation(len(y_train))
    found = {}
    for budget in sorted(n for n in cfg.budgets if n <= len(y_train)):
        rows = shuffled[:budget]
        found[budget] = {
            name: margin_metrics(_fit(name, x_train[rows], y_train[rows], cfg, {}).predict(x_test), y_test)
            for name in ("ridge", "mlp")
        }
    return found


def _write_margins(
    cfg: Config, run: RunFolder, store: Representations, predictor: MarginPredictor, rated: list[Preference]
) -> dict[str, Any]:
    """`margins.jsonl`: pairs with their predicted margin, cut to [0, 1]."""
    pairs = rated if cfg.predict is None else cfg.predict.load(keep_ties=True).pairs
    margins_N = predictor.predict(store.h_ND[store.rows_of([pair.id for pair in pairs])]).clip(0, 1)
    with (run.path / "margins.jsonl").open("w", encoding="utf-8") as file:
        for pair, margin in zip(pairs, margins_N.tolist(), strict=True):
            texts = {"prompt": pair.prompt_text, "chosen": pair.chosen, "rejected": pair.rejected}
            file.write(json.dumps({"id": pair.id, **texts, "margin": margin}, ensure_ascii=False) + "\n")
    return {"pairs": len(pairs), "mean": float(margins_N.mean()), "predictor": predictor.kind}


def _plot(run: RunFolder, report: dict[str, Any], predicted_N: np.ndarray, label_N: np.ndarray) -> None:
    run.plots.mkdir(exist_ok=True)
    title = f"{len(label_N)} test pairs"
    plot_predictions(predicted_N, label_N, run.plots / "predictions.png", title=title)
    plot_spearman(report["predictors"], run.plots / "spearman.png", title=title)
    if report["budgets"]:
        plot_budgets(report["budgets"], run.plots / "budgets.png", title=title)


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
