"""Best-of-n (check 20)."""

from __future__ import annotations

import math
from random import Random

import pytest

from eagleray.models.rovrm.best_of_n import Candidates, best_of, best_of_n_curve, group_candidates
from eagleray.models.rovrm.records import VisualPreference

RNG = Random(0)
GROUPS = [
    Candidates([RNG.gauss(0, 1) for _ in range(16)], [float(RNG.random() < 0.5) for _ in range(16)])
    for _ in range(20)
]


def test_check_20_the_choice_survives_increasing_maps() -> None:
    for group in GROUPS:
        chosen = best_of(group.rewards)
        for increasing in (math.exp, math.atan, lambda r: 3 * r - 7):
            assert best_of([increasing(r) for r in group.rewards]) == chosen


def test_check_20_ties_and_single_samples() -> None:
    assert best_of([0.3]) == 0
    assert best_of([1.0, 2.0, 2.0]) == 1
    for broken in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="best-of-n needs numbers"):
            best_of(broken)


def test_check_20_the_curve() -> None:
    rows = best_of_n_curve(GROUPS)
    assert [row["n"] for row in rows] == [1, 2, 4, 8, 16]
    assert [row["kl"] for row in rows] == pytest.approx([0, 0.193147, 0.636294, 1.204442, 1.835089], abs=1e-6)
    rewards = [row["reward"] for row in rows]
    assert rewards == sorted(rewards)
    assert all(row["value"] <= row["oracle"] for row in rows)
    assert rows[0]["value"] == pytest.approx(rows[0]["random"])
    chosen = [group.qualities[best_of(group.rewards)] for group in GROUPS]
    assert rows[-1]["value"] == pytest.approx(sum(chosen) / len(GROUPS))


def test_the_interval_is_over_pictures_and_the_gain_is_paired_with_chance() -> None:
    # Two pictures, both with one true answer of two: chosen in one, missed in the other.
    last = best_of_n_curve([Candidates([1, 0], [1, 0]), Candidates([0, 1], [1, 0])], samples=2000)[-1]
    assert (last["value"], last["random"]) == (0.5, 0.5)
    assert (last["low"], last["high"]) == (0.0, 1.0)  # a quarter of the bootstraps is all of either
    assert last["gain"] == {"value": 0.0, "low": -0.5, "high": 0.5}
    # Pictures that differ in how many answers are true, where the choice always gains a half: no doubt about the gain.
    sure = best_of_n_curve([Candidates([1, 0], [1, 0]), Candidates([1, 0], [3, 2])])[-1]
    assert sure["low"] < sure["high"]
    assert sure["gain"] == {"value": 0.5, "low": 0.5, "high": 0.5}


def test_a_perfect_reward_reaches_the_oracle_and_a_blind_one_nothing() -> None:
    perfect = best_of_n_curve([Candidates(g.qualities, g.qualities) for g in GROUPS])
    assert all(row["value"] == row["oracle"] for row in perfect)
    constant = best_of_n_curve([Candidates([0.0] * 16, g.qualities) for g in GROUPS])
    assert constant[-1]["value"] == pytest.approx(constant[-1]["random"])


def test_pairs_about_one_picture_are_candidates() -> None:
    records = [
        VisualPreference("1", "Fact?", ("a", "b"), "x.png"),
        VisualPreference("2", "Fact?", ("c", "d"), "x.png"),
        VisualPreference("3", "Fact?", ("e", "f"), "y.png"),
        VisualPreference("4", "Fact?", ("g", "h")),
    ]
    [group] = group_candidates(records, [[1, 2], [3, 4], [5, 6], [7, 8]])
    assert (group.rewards, group.qualities) == ([1, 2, 3, 4], [1, 0, 1, 0])


def test_no_group() -> None:
    with pytest.raises(ValueError, match="no group of candidates"):
        best_of_n_curve([])
