"""Confidence intervals of the headline figures of `benchmarks.benchmark_metrics`, by the bootstrap over prompts.

Each headline figure is a weighted mean over groups (sections, categories, domains, cells) of a mean over pairs, so
all replicates of all figures follow from one matrix of resampled column means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from eagleray.models.gram.benchmark_formats import LLMBAR_ADVERSARIAL, LLMBAR_SUBSETS, REWARDBENCH_SECTIONS
from eagleray.models.gram.benchmarks import (
    BenchmarkPair,
    ReasoningWeighting,
    check_benchmark,
    strictly_correct,
)
from eagleray.models.gram.judge import Comparison
from eagleray.models.gram.metrics import percentile_interval, resampled_means


@dataclass(frozen=True)
class _Figure:
    """sum over groups of weight * mean of `right_N` over the group, divided by the sum of the weights."""

    right_N: np.ndarray
    groups_N: np.ndarray
    weights: Mapping[str, float]


def benchmark_intervals(
    name: str,
    pairs: Sequence[BenchmarkPair],
    comparisons: Sequence[Comparison],
    *,
    reasoning_weighting: ReasoningWeighting = "official",
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Value, low and high end of each headline figure, under the dotted path that it has in `benchmark_metrics`.

    Args:
        name: A key of `benchmarks.BENCHMARKS`.
        pairs: What `read_benchmark` gave.
        comparisons: One for each pair, with the chosen answer first.
        reasoning_weighting: Of RewardBench.
        samples: Bootstrap replicates.
        seed: Seed of the resampling.
    """
    check_benchmark(name, pairs)
    right_N = np.array([c.p_a > 0.5 for c in comparisons], dtype=np.float64)
    groups_N = np.array([pair.group for pair in pairs])
    if name == "rewardbench":
        figures = _rewardbench(right_N, groups_N, reasoning_weighting)
    elif name == "judgebench":
        strict_N = np.array([strictly_correct(c) for c in comparisons], dtype=np.float64)
        figures = _averages(strict_N, groups_N, "strict.") | _averages(right_N, groups_N, "avgprob.")
    elif name == "rmbench":
        figures = _rmbench(right_N, groups_N, np.array([pair.cell for pair in pairs]))
    elif name == "llmbar":
        figures = _llmbar(right_N, groups_N)
    else:
        figures = _averages(right_N, groups_N)
    return _bootstrapped(figures, [pair.prompt for pair in pairs], samples=samples, seed=seed)


def _rewardbench(
    right_N: np.ndarray, groups_N: np.ndarray, reasoning_weighting: ReasoningWeighting
) -> dict[str, _Figure]:
    counts = _counts(groups_N)
    shares: dict[str, dict[str, float]] = {}
    for section, subsets in REWARDBENCH_SECTIONS.items():
        there = {subset: float(counts[subset]) for subset in subsets if subset in counts}
        code = sum(count for subset, count in there.items() if subset.startswith("hep-"))
        if reasoning_weighting == "official" and code and "math-prm" in there:
            there["math-prm"] = code
        if there:
            shares[section] = {subset: count / sum(there.values()) for subset, count in there.items()}
    figures = {f"sections.{s}.accuracy": _Figure(right_N, groups_N, share) for s, share in shares.items()}
    overall = {subset: weight for share in shares.values() for subset, weight in share.items()}
    return {"overall": _Figure(right_N, groups_N, overall)} | figures


def _rmbench(right_N: np.ndarray, groups_N: np.ndarray, cells_N2: np.ndarray) -> dict[str, _Figure]:
    # The two halves of safety are one domain, pooled by count.
    domains_N = np.array([str(group).split("-")[0] for group in groups_N])
    levels_N = np.array(["normal", "easy", "hard"])[np.sign(cells_N2[:, 0] - cells_N2[:, 1])]
    figures = {"overall": _Figure(right_N, domains_N, dict.fromkeys(_counts(domains_N), 1.0))}
    for level in ("hard", "normal", "easy"):
        figures[f"all_prompts.{level}"] = _Figure(right_N, levels_N, {level: 1.0})
    figures["all_prompts.accuracy"] = _micro(right_N)
    for domain in _counts(domains_N):
        figures[f"domains.{domain}.accuracy"] = _Figure(right_N, domains_N, {domain: 1.0})
    return figures


def _llmbar(right_N: np.ndarray, groups_N: np.ndarray) -> dict[str, _Figure]:
    counts = _counts(groups_N)
    own = {group: float(counts[group]) for group in LLMBAR_SUBSETS if group in counts}
    adversarial = [group for group in LLMBAR_ADVERSARIAL if group in counts]
    figures = {f"groups.{group}.accuracy": _Figure(right_N, groups_N, {group: 1.0}) for group in counts}
    if own:
        figures["macro"] = _Figure(right_N, groups_N, dict.fromkeys(own, 1.0))
        figures["micro"] = _Figure(right_N, np.isin(groups_N, list(own)).astype(str), {"True": 1.0})
    if adversarial:
        figures["adversarial"] = _Figure(right_N, groups_N, dict.fromkeys(adversarial, 1.0))
    return figures


def _averages(right_N: np.ndarray, groups_N: np.ndarray, prefix: str = "") -> dict[str, _Figure]:
    counts = _counts(groups_N)
    return {
        f"{prefix}macro": _Figure(right_N, groups_N, dict.fromkeys(counts, 1.0)),
        f"{prefix}micro": _micro(right_N),
        **{f"{prefix}groups.{g}.accuracy": _Figure(right_N, groups_N, {g: 1.0}) for g in counts},
    }


def _micro(right_N: np.ndarray) -> _Figure:
    return _Figure(right_N, np.full(len(right_N), "all"), {"all": 1.0})


def _counts(groups_N: np.ndarray) -> dict[str, int]:
    names, counts = np.unique(groups_N, return_counts=True)
    return {str(name): int(count) for name, count in zip(names, counts, strict=True)}


def _bootstrapped(
    figures: Mapping[str, _Figure], prompts: Sequence[str], *, samples: int, seed: int
) -> dict[str, dict[str, float]]:
    columns: list[np.ndarray] = []
    for figure in figures.values():
        for group in figure.weights:
            inside_N = (figure.groups_N == group).astype(np.float64)
            columns += [inside_N * figure.right_N, inside_N]
    values_NK = np.column_stack(columns)
    resampled_RK = resampled_means(values_NK, prompts, samples=samples, seed=seed)
    means_RK = np.vstack([values_NK.mean(0), resampled_RK])  # the first row is the data itself
    found: dict[str, dict[str, float]] = {}
    start = 0
    for name, figure in figures.items():
        right_RG, inside_RG = np.split(
            means_RK[:, start : start + 2 * len(figure.weights)].reshape(len(means_RK), -1, 2), 2, axis=2
        )
        start += 2 * len(figure.weights)
        weight_G = np.array(list(figure.weights.values()))
        with np.errstate(invalid="ignore"):  # a replicate may lack a group: not a number, and left out
            value_R = (right_RG / inside_RG)[..., 0] @ (weight_G / weight_G.sum())
        found[name] = asdict(percentile_interval(float(value_R[0]), value_R[1:]))
    return found
