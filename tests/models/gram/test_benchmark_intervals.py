"""Intervals of benchmark figures: they belong to the figures of the report, and to the slow way of computing them."""

from __future__ import annotations

import json
from functools import reduce
from typing import Any

import numpy as np
import pytest

from eagleray.models.gram.benchmark_formats import HHH_CATEGORIES, REWARDBENCH_SECTIONS
from eagleray.models.gram.benchmark_intervals import benchmark_intervals
from eagleray.models.gram.benchmarks import BenchmarkPair, benchmark_metrics
from eagleray.models.gram.judge import Comparison, read_out

GROUPS = {
    "rewardbench": [subset for subsets in REWARDBENCH_SECTIONS.values() for subset in subsets][::2],
    "judgebench": ["knowledge", "reasoning", "math"],
    "rmbench": ["chat", "safety-refuse", "safety-response"],
    "hhh": list(HHH_CATEGORIES),
    "llmbar": ["natural", "adv_neighbor", "adv_manual", "mt_bench"],
}


def _sample(name: str, prompts: int, seed: int = 0) -> tuple[list[BenchmarkPair], list[Comparison]]:
    """Random verdicts on three pairs a prompt (nine for RM-Bench), with ties and orders that disagree."""
    rng = np.random.default_rng(seed)
    cells = [(i, j) for i in range(3) for j in range(3)] if name == "rmbench" else [None] * 3
    pairs = []
    for number in range(prompts):
        group = GROUPS[name][number % len(GROUPS[name])]
        extra = {"item": f"item {number}"}
        pairs += [
            BenchmarkPair(f"{number}-{k}", f"prompt {number}", "a", "b", group, cell, extra)
            for k, cell in enumerate(cells)
        ]
    margins = rng.choice([-1.5, -0.5, 0.0, 0.5, 1.5, 2.5], size=(len(pairs), 2))
    return pairs, [read_out(*row) for row in margins.tolist()]


def _at(report: dict[str, Any], path: str) -> float:
    return reduce(lambda part, key: part[key], path.split("."), report)


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in GROUPS), ("rewardbench", {"reasoning_weighting": "pooled"})],
)
def test_every_figure_is_that_of_the_report(name: str, options: dict[str, Any]) -> None:
    pairs, comparisons = _sample(name, 48)
    report = benchmark_metrics(name, pairs, comparisons, **options)
    intervals = benchmark_intervals(name, pairs, comparisons, samples=200, **options)
    assert len(intervals) >= 4
    for path, found in intervals.items():
        assert found["value"] == pytest.approx(_at(report, path)), path
        assert found["low"] <= found["value"] <= found["high"], path
    assert json.loads(json.dumps(intervals, allow_nan=False)) == intervals


def test_interval_of_the_macro_mean_is_that_of_resampled_prompts() -> None:
    """The slow way: draw prompts with the same weights, list their pairs as often, and read the report."""
    pairs, comparisons = _sample("hhh", 20)
    found = benchmark_intervals("hhh", pairs, comparisons, samples=200, seed=4)["macro"]
    replicates = []
    for counts in np.random.default_rng(4).multinomial(20, np.full(20, 1 / 20), size=200):
        drawn = [i for i in range(len(pairs)) for _ in range(counts[i // 3])]
        report = benchmark_metrics("hhh", [pairs[i] for i in drawn], [comparisons[i] for i in drawn])
        if not report["missing_groups"]:  # a macro mean of fewer groups is another figure
            replicates.append(report["macro"])
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(replicates, [0.025, 0.975])))


def test_more_prompts_give_narrower_intervals() -> None:
    widths = []
    for prompts in (24, 240):
        found = benchmark_intervals("rmbench", *_sample("rmbench", prompts), samples=300)["overall"]
        widths.append(found["high"] - found["low"])
    assert widths[1] < 0.5 * widths[0]


def test_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="no pairs of 'hhh'"):
        benchmark_intervals("hhh", [], [])
