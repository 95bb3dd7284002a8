"""Figures of a judge against numbers by hand, closed forms of the bootstrap, other implementations."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss

from eagleray.models.gram.judge import Comparison, read_out
from eagleray.models.gram.metrics import (
    accuracy_by_length_gap,
    bootstrap,
    brier_score,
    evaluate_comparisons,
    expected_calibration_error,
    mean_estimate,
    paired_difference,
    reliability,
)


def scalar(difference: float) -> Comparison:
    """The verdict of a scorer that rates each answer alone, so it cannot have a favourite slot."""
    return read_out(difference, -difference)


def evaluated(comparisons: Sequence[Comparison], **options) -> dict:  # type: ignore[no-untyped-def]
    count = len(comparisons)
    defaults = {"prompts": [f"q{i}" for i in range(count)], "length_gaps": [0] * count, "samples": 50}
    return evaluate_comparisons(comparisons, **(defaults | options))


def test_calibration_error_by_hand() -> None:
    # Bin of 0.95: accuracy 1, gap 0.05 for two pairs; bin of 0.6: one of two right, gap 0.1 for two pairs.
    assert expected_calibration_error([0.95, 0.95, 0.6, 0.4], bins=10) == pytest.approx((0.1 + 0.2) / 4)
    assert expected_calibration_error([0.75, 0.75, 0.75, 0.25]) == pytest.approx(0.0)
    assert expected_calibration_error([1.0, 1.0]) == 0.0
    assert expected_calibration_error([0.0, 0.0]) == 1.0
    assert expected_calibration_error([0.5, 0.5]) == 0.5  # confidence 0.5, and a tie is never right


def test_calibration_error_equals_a_loop_over_the_bins() -> None:
    p = np.random.default_rng(1).random(500)
    expected = 0.0
    for low in np.linspace(0, 1, 16)[:-1]:
        inside = [x for x in p if low <= max(x, 1 - x) < low + 1 / 15]
        if inside:
            gap = np.mean([x > 0.5 for x in inside]) - np.mean([max(x, 1 - x) for x in inside])
            expected += len(inside) / len(p) * abs(gap)
    assert expected_calibration_error(p) == pytest.approx(expected)


def test_reliability_points_by_hand_and_they_give_the_calibration_error() -> None:
    points = reliability([0.95, 0.91, 0.6, 0.4], bins=10)
    assert points == [
        {"confidence": pytest.approx(0.6), "accuracy": 0.5, "count": 2},
        {"confidence": pytest.approx(0.93), "accuracy": 1.0, "count": 2},
    ]
    p = np.random.default_rng(2).random(300)
    points = reliability(p)
    error = sum(point["count"] * abs(point["accuracy"] - point["confidence"]) for point in points) / 300
    assert sum(point["count"] for point in points) == 300
    assert error == pytest.approx(expected_calibration_error(p))


def test_brier_score_by_hand_and_beside_scikit_learn() -> None:
    assert brier_score([0.9, 0.5, 0.2]) == pytest.approx((0.01 + 0.25 + 0.64) / 3)
    rng = np.random.default_rng(3)
    labels, p_a = rng.integers(0, 2, 200), rng.random(200)
    p_chosen = np.where(labels == 1, p_a, 1 - p_a)
    assert brier_score(p_chosen) == pytest.approx(brier_score_loss(labels, p_a))


def test_bootstrap_of_a_share_is_the_normal_approximation() -> None:
    """280 of 400 right: 0.7 ± 1.96 √(0.7 · 0.3 / 400), here to a twentieth of its width."""
    estimate = mean_estimate([1.0] * 280 + [0.0] * 120, samples=4000, seed=1)
    half = 1.959964 * np.sqrt(0.7 * 0.3 / 400)
    assert estimate.value == pytest.approx(0.7)
    assert estimate.low == pytest.approx(0.7 - half, abs=half / 10)
    assert estimate.high == pytest.approx(0.7 + half, abs=half / 10)
    narrow = mean_estimate([1.0] * 280 + [0.0] * 120, samples=4000, seed=1, level=0.6826895)
    assert narrow.high - narrow.low == pytest.approx(2 * half / 1.959964, rel=0.1)


def test_bootstrap_takes_any_statistic_of_means() -> None:
    rng = np.random.default_rng(4)
    values = rng.normal([3.0, 2.0], 0.5, size=(300, 2))
    estimate = bootstrap(lambda means_RK: means_RK[:, 0] / means_RK[:, 1], values, samples=2000)
    assert estimate.value == pytest.approx(values[:, 0].mean() / values[:, 1].mean())
    ratio = estimate.value
    deviation = np.std(values[:, 0] - ratio * values[:, 1]) / values[:, 1].mean() / np.sqrt(300)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.959964 * deviation, rel=0.1)


def test_clusters_of_copies_count_once() -> None:
    """Four copies of each row hold no more information: exactly the interval of the rows themselves."""
    rows = (np.random.default_rng(5).random(100) < 0.6).astype(float)
    copies, clusters = np.repeat(rows, 4), np.repeat([f"q{i}" for i in range(100)], 4).tolist()
    clustered = mean_estimate(copies, clusters=clusters, seed=7)
    single = mean_estimate(rows, seed=7)
    assert (clustered.low, clustered.high) == pytest.approx((single.low, single.high))
    naive = mean_estimate(copies, seed=7)
    assert clustered.high - clustered.low == pytest.approx(2 * (naive.high - naive.low), rel=0.15)


def test_clusters_of_different_size_follow_the_variance_of_a_ratio() -> None:
    """Var = Σ_c (s_c − m n_c)² / N², with s_c the sum and n_c the size of a cluster."""
    rng = np.random.default_rng(6)
    sizes = rng.integers(1, 8, 200)
    levels = np.repeat(rng.random(200), sizes)
    values = (rng.random(sizes.sum()) < levels).astype(float)
    clusters = np.repeat(np.arange(200), sizes)
    estimate = mean_estimate(values, clusters=clusters.tolist(), samples=4000)
    residuals = np.array([(values[clusters == c] - values.mean()).sum() for c in range(200)])
    deviation = np.sqrt((residuals**2).sum()) / len(values)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.high - estimate.low == pytest.approx(2 * 1.959964 * deviation, rel=0.07)


def test_bootstrap_depends_on_its_seed_and_nothing_else() -> None:
    values = np.random.default_rng(8).random(50)
    first = mean_estimate(values, clusters=[f"q{i % 10}" for i in range(50)], seed=3)
    assert first == mean_estimate(values, clusters=[i % 10 for i in range(50)], seed=3)
    assert first != mean_estimate(values, clusters=[i % 10 for i in range(50)], seed=4)


def test_one_long_prompt_does_not_blow_up_memory() -> None:
    prompts = [f"q{i}" for i in range(500)] + ["x" * 100_000]
    tracemalloc.start()
    mean_estimate(np.ones(501), clusters=prompts, samples=10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000  # an array of these strings takes 200 MB


def test_paired_difference_uses_that_errors_are_shared() -> None:
    rng = np.random.default_rng(9)
    right = rng.random(400) < 0.7
    other = right.copy()
    other[:20] = ~other[:20]
    same = paired_difference(right.tolist(), right.tolist())
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    paired = paired_difference(right.tolist(), other.tolist(), samples=2000)
    difference = right.astype(float) - other
    assert paired.value == pytest.approx(difference.mean())
    assert paired.high - paired.low == pytest.approx(2 * 1.959964 * difference.std() / 20, rel=0.1)


def test_report_by_hand() -> None:
    """Order 1 and order 2 margins of three pairs: right twice, right then wrong, wrong twice."""
    comparisons = [read_out(2.0, -1.0), read_out(1.0, 0.5), read_out(-1.0, 3.0)]
    report = evaluated(comparisons, prompts=["q", "q", "r"], length_gaps=[10, -10, -300])
    p = [c.p_a for c in comparisons]
    assert p == pytest.approx([(0.880797 + 0.731059) / 2, (0.731059 + 0.377541) / 2, 0.158183], abs=1e-6)
    assert (report["pairs"], report["prompts"]) == (3, 2)
    assert report["accuracy"]["value"] == pytest.approx(2 / 3)
    assert report["ties"]["value"] == 0.0
    assert report["nll"]["value"] == pytest.approx(-np.log(p).mean())
    assert report["brier"]["value"] == pytest.approx(brier_score(p))
    assert report["consistency"]["value"] == pytest.approx(2 / 3)
    assert report["slot_a_rate"]["value"] == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert report["mean_abs_delta"]["value"] == pytest.approx((1.5 + 0.75 + 2.0) / 3)
    assert report["ece"] == pytest.approx(expected_calibration_error(p))
    assert [(row["from"], row["count"]) for row in report["by_length_gap"]] == [
        (None, 1),
        (-50.0, 1),
        (0.0, 1),
    ]
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_intervals_of_the_report_are_those_of_each_column() -> None:
    comparisons = [read_out(*margins) for margins in np.random.default_rng(10).normal(size=(60, 2)).tolist()]
    prompts = [f"q{i % 20}" for i in range(60)]
    report = evaluated(comparisons, prompts=prompts, samples=300, seed=5)
    alone = mean_estimate([c.p_a > 0.5 for c in comparisons], clusters=prompts, samples=300, seed=5)
    assert report["accuracy"] == pytest.approx(vars(alone))
    alone = mean_estimate([(1 - c.p_a) ** 2 for c in comparisons], clusters=prompts, samples=300, seed=5)
    assert report["brier"] == pytest.approx(vars(alone))


def test_interval_of_the_calibration_error_is_that_of_resampled_pairs() -> None:
    """The replicates by the slow way: the error of each resample, drawn with the same weights."""
    comparisons = [scalar(x) for x in np.random.default_rng(11).normal(1.0, 1.5, size=40).tolist()]
    report = evaluated(comparisons, samples=200, seed=3)
    weights = np.random.default_rng(3).multinomial(40, np.full(40, 1 / 40), size=200)
    p = np.array([c.p_a for c in comparisons])
    errors = [expected_calibration_error(np.repeat(p, counts)) for counts in weights]
    found = report["ece_interval"]
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(errors, [0.025, 0.975])))
    assert found["value"] == report["ece"]


def test_intervals_by_length_gap_are_those_of_the_pairs_in_the_bin() -> None:
    """Two pairs in one bin, right and wrong; the third bin holds a pair that some replicates lack."""
    comparisons = [scalar(1.0), scalar(-1.0), scalar(1.0)]
    rows = evaluated(comparisons, length_gaps=[10, 20, 500], samples=400)["by_length_gap"]
    assert [(row["accuracy"], row["low"], row["high"]) for row in rows] == [(0.5, 0.0, 1.0), (1.0, 1.0, 1.0)]


@pytest.mark.parametrize("bias", [5.0, -5.0])
def test_a_judge_that_always_takes_one_slot(bias: float) -> None:
    report = evaluated([read_out(bias + 0.1, bias - 0.1), read_out(bias - 0.1, bias + 0.1)])
    assert report["slot_a_rate"]["value"] == (1.0 if bias > 0 else 0.0)
    assert report["consistency"]["value"] == 0.0
    assert report["accuracy"]["value"] == 0.5  # the average of both orders still sees the small difference


def test_a_scorer_without_slots_has_no_favourite_even_in_ties() -> None:
    report = evaluated([scalar(2.0), scalar(-1.0), scalar(0.0), scalar(0.0)])
    assert report["slot_a_rate"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert report["consistency"]["value"] == 1.0
    assert (report["accuracy"]["value"], report["ties"]["value"]) == (0.25, 0.5)


def test_certain_and_wrong_stays_finite() -> None:
    report = evaluated([scalar(-1e6)])
    assert report["nll"]["value"] == pytest.approx(12 * np.log(10))
    assert report["brier"]["value"] == 1.0


def test_length_gaps_fall_into_half_open_bins() -> None:
    gaps = np.array([-300, -200, -50, 0, 49, 200])
    p = np.array([0.9, 0.1, 0.5, 0.9, 0.2, 0.6])
    assert accuracy_by_length_gap(p, gaps) == [
        {"from": None, "to": -200.0, "accuracy": 1.0, "count": 1},
        {"from": -200.0, "to": -50.0, "accuracy": 0.0, "count": 1},
        {"from": -50.0, "to": 0.0, "accuracy": 0.0, "count": 1},
        {"from": 0.0, "to": 50.0, "accuracy": 0.5, "count": 2},
        {"from": 200.0, "to": None, "accuracy": 1.0, "count": 1},
    ]


@pytest.mark.parametrize("comparisons", [[], [scalar(1.0)]])
def test_columns_of_different_length_are_refused(comparisons: list[Comparison]) -> None:
    with pytest.raises(ValueError, match=r"one of each for every pair, and at least one"):
        evaluate_comparisons(comparisons, prompts=["q", "r"][: 2 * len(comparisons)], length_gaps=[])
