"""How good a judge of pairs is: accuracy, calibration and bias, each with a bootstrap interval.

Everything is computed from comparisons oriented so that the *first* answer is the chosen one: `p_a` is the
probability given to the right answer. Prompts repeat in preference data, so intervals resample whole prompts.

Shapes: N pairs, C clusters (prompts), R bootstrap replicates.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from eagleray.models.gram.judge import Comparison

LENGTH_GAPS = (-np.inf, -200, -50, 0, 50, 200, np.inf)
"""Edges of the bins of (length of chosen - length of rejected), in characters."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its bootstrap interval."""

    value: float
    low: float
    high: float


def expected_calibration_error(p_chosen: Sequence[float] | np.ndarray, *, bins: int = 15) -> float:
    """ECE over equal-width bins of confidence max(p, 1 − p): Σ (n_bin / N) |accuracy − mean confidence|.

    A probability of exactly 0.5 decides for no answer and counts as wrong.

    >>> round(expected_calibration_error([0.9, 0.9, 0.9, 0.1]), 6)
    0.15
    """
    p_N = np.asarray(p_chosen, dtype=np.float64)
    confidence_N, right_N, bin_N = _calibration_terms(p_N, bins)
    gaps = [abs((right_N - confidence_N)[bin_N == b].sum()) for b in np.unique(bin_N)]
    return float(sum(gaps) / len(p_N))


def brier_score(p_chosen: Sequence[float] | np.ndarray) -> float:
    """Mean squared error (1 − p)² of the probability of the right answer; 0.25 for always 0.5."""
    return float(np.mean((1 - np.asarray(p_chosen, dtype=np.float64)) ** 2))


def reliability(p_chosen: Sequence[float] | np.ndarray, *, bins: int = 15) -> list[dict[str, float]]:
    """Points of a reliability plot: mean confidence, accuracy and count of each bin that is not empty."""
    confidence_N, right_N, bin_N = _calibration_terms(np.asarray(p_chosen, dtype=np.float64), bins)
    return [
        {
            "confidence": float(confidence_N[bin_N == b].mean()),
            "accuracy": float(right_N[bin_N == b].mean()),
            "count": int((bin_N == b).sum()),
        }
        for b in np.unique(bin_N)
    ]


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    values: np.ndarray,
    *,
    clusters: Sequence[Hashable] | None = None,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Percentile interval of a statistic that is a function of weighted column means.

    Args:
        statistic: From column means [R, K] to values [R].
        values: Columns [N, K] whose means the statistic needs.
        clusters: Label of each row; rows with one label are drawn together. Default: each row is its own.
        samples: Replicates R.
        seed: Seed of the resampling.
        level: Coverage.
    """
    means_RK = resampled_means(values, clusters, samples=samples, seed=seed)
    return percentile_interval(
        float(statistic(values.mean(0, keepdims=True))[0]), statistic(means_RK), level=level
    )


def resampled_means(
    values: np.ndarray, clusters: Sequence[Hashable] | None, *, samples: int = 1000, seed: int = 0
) -> np.ndarray:
    """Column means [R, K] of `values` [N, K] in replicates that draw whole clusters; options as in `bootstrap`."""
    labels_N = np.arange(len(values)) if clusters is None else _numbered(clusters)
    count = int(labels_N.max()) + 1
    sums_CK = np.zeros((count, values.shape[1] + 1))
    np.add.at(sums_CK, labels_N, np.column_stack([values, np.ones(len(values))]))
    weights_RC = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=samples)
    totals_RK = weights_RC @ sums_CK
    return totals_RK[:, :-1] / totals_RK[:, -1:]


def percentile_interval(value: float, replicates_R: np.ndarray, *, level: float = 0.95) -> Estimate:
    """A figure with the percentiles of its replicates; those in which it is not defined (NaN) do not count.

    A replicate may lack a small group, and then has no mean of that group.
    """
    low, high = np.nanquantile(replicates_R, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


def mean_estimate(values: Sequence[float] | np.ndarray, **options: Any) -> Estimate:
    """Mean of one column with its interval; options as in `bootstrap`."""
    column = np.asarray(values, dtype=np.float64)[:, None]
    return bootstrap(lambda means_RK: means_RK[:, 0], column, **options)


def evaluate_comparisons(
    comparisons: Sequence[Comparison],
    *,
    prompts: Sequence[str],
    length_gaps: Sequence[int],
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """All figures of one scorer on one set of pairs, ready for JSON.

    Args:
        comparisons: One a pair, with the chosen answer first.
        prompts: Prompt of each pair; pairs of one prompt are resampled together.
        length_gaps: Characters of the chosen answer minus those of the rejected one.
        samples: Bootstrap replicates.
        seed: Seed of the resampling.
    """
    if not len(comparisons) == len(prompts) == len(length_gaps) > 0:
        raise ValueError(
            f"There are {len(comparisons)} comparisons, {len(prompts)} prompts and {len(length_gaps)} length "
            "gaps; there must be one of each for every pair, and at least one pair."
        )
    p_N = np.array([c.p_a for c in comparisons])
    columns = _pair_columns(comparisons)
    report: dict[str, Any] = {"pairs": len(p_N), "prompts": len(set(prompts))}
    values_NK = np.column_stack(list(columns.values())).astype(np.float64)
    gaps_NB = _calibration_gaps(p_N)
    rows = accuracy_by_length_gap(p_N, np.asarray(length_gaps))
    inside_NG = _length_gap_members(np.asarray(length_gaps), rows)
    right_NG = inside_NG * (p_N > 0.5)[:, None]
    # Drawn once for all figures: it takes seconds.
    means_RK = resampled_means(
        np.column_stack([values_NK, gaps_NB, inside_NG, right_NG]), prompts, samples=samples, seed=seed
    )
    main_RK, gaps_RB, inside_RG, right_RG = np.split(
        means_RK, np.cumsum([values_NK.shape[1], gaps_NB.shape[1], len(rows)]), axis=1
    )
    for k, name in enumerate(columns):
        report[name] = asdict(percentile_interval(float(values_NK[:, k].mean()), main_RK[:, k]))
    report["ece"] = expected_calibration_error(p_N)
    report["ece_interval"] = asdict(percentile_interval(report["ece"], np.abs(gaps_RB).sum(1)))
    report["reliability"] = reliability(p_N)
    for g, row in enumerate(rows):
        found = percentile_interval(float(row["accuracy"] or 0.0), _ratio(right_RG[:, g], inside_RG[:, g]))
        row.update(low=found.low, high=found.high)
    report["by_length_gap"] = rows
    return report


def accuracy_by_length_gap(p_chosen: np.ndarray, length_gaps: np.ndarray) -> list[dict[str, float | None]]:
    """Accuracy where the chosen answer is shorter or longer by so many characters; without empty bins."""
    rows: list[dict[str, float | None]] = []
    for low, high in pairwise(LENGTH_GAPS):
        inside = (length_gaps >= low) & (length_gaps < high)
        if inside.any():
            rows.append(
                {
                    "from": None if np.isinf(low) else float(low),
                    "to": None if np.isinf(high) else float(high),
                    "accuracy": float((p_chosen[inside] > 0.5).mean()),
                    "count": int(inside.sum()),
                }
            )
    return rows


def paired_difference(
    right: Sequence[bool],
    other: Sequence[bool],
    *,
    clusters: Sequence[Hashable] | None = None,
    **options: Any,
) -> Estimate:
    """Difference in accuracy of two scorers on the same pairs, with the interval of the paired bootstrap."""
    difference = np.asarray(right, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    return mean_estimate(difference, clusters=clusters, **options)


def _pair_columns(comparisons: Sequence[Comparison]) -> dict[str, np.ndarray]:
    """The figures that are plain means over pairs."""
    p_N = np.array([c.p_a for c in comparisons])
    delta_N2 = np.array([(c.delta1, c.delta2) for c in comparisons])
    return {
        "accuracy": p_N > 0.5,
        "ties": p_N == 0.5,
        "nll": -np.log(np.clip(p_N, 1e-12, None)),
        "brier": (1 - p_N) ** 2,
        "consistency": np.array([c.consistent for c in comparisons]),
        # In the second order the chosen answer stands in slot B, so together the data is balanced.
        # No preference counts half, as for a scorer that cannot see the slots.
        "slot_a_rate": ((np.sign(delta_N2) + 1) / 2).mean(1),
        "mean_abs_delta": np.abs(delta_N2).mean(1),
    }


def _numbered(labels: Sequence[Hashable]) -> np.ndarray:
    # Not `np.unique`: in an array of prompts each takes as much memory as the longest of them.
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels])


def _calibration_terms(p_N: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    confidence_N = np.maximum(p_N, 1 - p_N)
    # Confidence lies in [0.5, 1]; bins are equal parts of [0, 1], as is usual, and the last one includes 1.
    bin_N = np.minimum((confidence_N * bins).astype(int), bins - 1)
    return confidence_N, (p_N > 0.5).astype(np.float64), bin_N


def _calibration_gaps(p_N: np.ndarray, bins: int = 15) -> np.ndarray:
    """Columns [N, B] whose means are the terms of the ECE before their absolute values are taken."""
    confidence_N, right_N, bin_N = _calibration_terms(p_N, bins)
    gaps_NB = np.zeros((len(p_N), bins))
    gaps_NB[np.arange(len(p_N)), bin_N] = right_N - confidence_N
    return gaps_NB


def _length_gap_members(length_gaps: np.ndarray, rows: Sequence[Mapping[str, float | None]]) -> np.ndarray:
    """Whether each pair belongs to each row of `accuracy_by_length_gap`, as columns [N, G]."""
    edges = [
        (-np.inf if r["from"] is None else r["from"], np.inf if r["to"] is None else r["to"]) for r in rows
    ]
    return np.column_stack([(length_gaps >= low) & (length_gaps < high) for low, high in edges]).astype(float)


def _ratio(numerator_R: np.ndarray, denominator_R: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return numerator_R / denominator_R
