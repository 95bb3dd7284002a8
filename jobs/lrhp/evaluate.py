"""How good a pair encoder is: order accuracy, swap consistency, calibration, what its vectors know, and a map of them.

    python -m eagleray.jobs.lrhp.evaluate --config configs/lrhp/evaluate_tiny.yaml model.path=...

Every pair is read in both orders. The figures are those of `gram.evaluate`, with the same intervals, beside the longer
answer as a baseline, and those of each order by itself. The run folder gets `report.json`, a line a pair under
`results/`, and plots.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from rich.console import Console
from rich.table import Table

from eagleray.jobs.lrhp.data import PairSet, named_pairs, tags_of
from eagleray.jobs.lrhp.encode import EncoderSection, build_representer, text_row
from eagleray.models.gram.baselines import LongerAnswer
from eagleray.models.gram.judge import Comparison, read_out
from eagleray.models.gram.metrics import evaluate_comparisons
from eagleray.models.gram.plots import plot_accuracy, plot_length_gap, plot_reliability
from eagleray.models.lrhp.metrics import linear_probe, order_metrics, silhouette
from eagleray.models.lrhp.plots import Projection, plot_map, project
from eagleray.models.lrhp.store import unit
from eagleray.platform.data.preferences import Preference
from eagleray.platform.runs import RunFolder
from eagleray.platform.scoring import map_with_model
from eagleray.platform.sections import JobConfig

JOB = "lrhp.evaluate"
_MAP_ROWS = 5000


class Config(JobConfig):
    """Config of `lrhp.evaluate`."""

    job: Literal["lrhp.evaluate"] = JOB
    model: EncoderSection
    data: dict[str, PairSet] = Field(min_length=1)
    """Sets of pairs by name; ids must differ."""
    projection: Projection = "tsne"
    """How the map puts vectors on paper: t-SNE, or the first two principal components."""
    bootstrap: int = Field(default=1000, ge=100)
    """Bootstrap replicates of an interval."""
    seed: int = Field(default=0, ge=0)
    """Seed of the bootstrap, of the probes and of the map."""


def main(cfg: Config) -> dict[str, Any]:
    """Read, judge, report, plot.

    Returns:
        The report: `sets` -> name -> `scorers` and `orders`; `vectors` -> what they tell of source and tag.
    """
    with RunFolder.create(JOB, cfg).recording() as run:
        sets = {name: section.load() for name, section in cfg.data.items()}
        sources = {pair.id: source for source, pair in named_pairs(sets)}
        run.update_manifest(data_hashes={k: v for loaded in sets.values() for k, v in loaded.hashes.items()})
        pairs = [pair for loaded in sets.values() for pair in loaded.pairs]
        rows = map_with_model(
            build_representer, {**cfg.model.arguments, "order": None}, [text_row(p) for p in pairs], cfg.ray
        )
        h_ND, u_N2 = np.stack([row["h"] for row in rows]), np.stack([row["u"] for row in rows])
        report: dict[str, Any] = {"model_hash": cfg.model.hash, "sets": {}}
        start = 0
        for name, loaded in sets.items():
            end = start + len(loaded.pairs)
            report["sets"][name] = _figures(cfg, loaded.pairs, u_N2[start:end])
            start = end
        labels = {"source": [sources[pair.id] for pair in pairs]}
        if all(tags_of(pair) for pair in pairs):
            labels["tag"] = [tags_of(pair)[0] for pair in pairs]
        report["vectors"] = {
            name: {
                "probe": linear_probe(h_ND, found, seed=cfg.seed),
                "silhouette": silhouette(unit(h_ND), found, seed=cfg.seed),
            }
            for name, found in labels.items()
        }
        _write_results(run.path / "results.jsonl", pairs, u_N2)
        run.write_report(report)
        _plot(cfg, run, report, h_ND, labels)
    print_table(report, Console())
    return report


def print_table(report: dict[str, Any], console: Console) -> None:
    """One line a set."""
    table = Table(title="order of the answers", title_justify="left")
    for column in (
        "set",
        "accuracy",
        "95 % interval",
        "chosen first",
        "chosen second",
        "consistency",
        "ECE",
        "longer",
    ):
        table.add_column(column, justify="left" if column == "set" else "right")
    for name, figures in report["sets"].items():
        ours, orders = figures["scorers"]["lrhp"], figures["orders"]
        table.add_row(
            name,
            f"{ours['accuracy']['value']:.3f}",
            f"{ours['accuracy']['low']:.3f} to {ours['accuracy']['high']:.3f}",
            f"{orders['accuracy_chosen_first']:.3f}",
            f"{orders['accuracy_chosen_second']:.3f}",
            f"{orders['consistency']:.3f}",
            f"{orders['ece']:.3f}",
            f"{figures['scorers']['longer answer']['accuracy']['value']:.3f}",
        )
    console.print(table)


def _figures(cfg: Config, pairs: list[Preference], u_N2: np.ndarray) -> dict[str, Any]:
    triples = [(pair.prompt_text, pair.chosen, pair.rejected) for pair in pairs]
    comparisons: dict[str, list[Comparison]] = {
        "lrhp": [read_out(*deltas) for deltas in u_N2.tolist()],
        "longer answer": LongerAnswer().compare(triples),
    }
    scorers = {
        name: evaluate_comparisons(
            found,
            prompts=[prompt for prompt, _, _ in triples],
            length_gaps=[len(chosen) - len(rejected) for _, chosen, rejected in triples],
            samples=cfg.bootstrap,
            seed=cfg.seed,
        )
        for name, found in comparisons.items()
    }
    return {"pairs": len(pairs), "scorers": scorers, "orders": order_metrics(u_N2)}


def _write_results(path: Path, pairs: list[Preference], u_N2: np.ndarray) -> None:
    with path.open("w", encoding="utf-8") as file:
        for pair, (forward, backward) in zip(pairs, u_N2.tolist(), strict=True):
            row = {"id": pair.id, "u_chosen_first": forward, "u_chosen_second": backward}
            file.write(json.dumps(row) + "\n")


def _plot(
    cfg: Config, run: RunFolder, report: dict[str, Any], h_ND: np.ndarray, labels: dict[str, list[str]]
) -> None:
    run.plots.mkdir(exist_ok=True)
    for name, figures in report["sets"].items():
        plot_accuracy(figures["scorers"], run.plots / f"{name}_accuracy.png", title=name)
        plot_reliability(figures["scorers"], run.plots / f"{name}_reliability.png", title=name)
        plot_length_gap(figures["scorers"], run.plots / f"{name}_length_gap.png", title=name)
    rows = np.random.default_rng(cfg.seed).permutation(len(h_ND))[:_MAP_ROWS]
    xy_N2 = project(unit(h_ND[rows]), cfg.projection, seed=cfg.seed)
    for name, found in labels.items():
        title = f"{len(rows)} pairs by {name} ({cfg.projection})"
        plot_map(xy_N2, [found[row] for row in rows], run.plots / f"map_{name}.png", title=title)


if __name__ == "__main__":
    from eagleray.jobs.launch import run_job

    run_job(JOB)
