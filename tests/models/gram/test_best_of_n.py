"""Best-of-n by hand, and against every subset written out."""

from __future__ import annotations

from itertools import combinations
from random import Random

import numpy as np
import pytest

from eagleray.models.gram.best_of_n import best_by_judge, expected_best


def test_expected_best_by_hand() -> None:
    """Of 4 answers with rewards 1 to 4, two drawn: the best is taken in 3 of 6 subsets, the next in 2, the third in 1."""
    assert expected_best([3, 1, 4, 2], [30, 10, 40, 20], 2) == pytest.approx((3 * 40 + 2 * 30 + 20) / 6)
    assert expected_best([3, 1, 4, 2], [5, 0, 9, 2], 1) == pytest.approx(4), "one drawn: the mean"
    assert expected_best([3, 1, 4, 2], [5, 0, 9, 2], 4) == 9, "all drawn: the best"


def test_expected_best_equals_the_mean_over_all_subsets_ties_included() -> None:
    rng = np.random.default_rng(0)
    rewards, qualities = rng.integers(0, 4, size=7).astype(float), rng.normal(size=7)
    assert len(set(rewards)) < 7
    for n in range(1, 8):
        found = []
        for subset in combinations(range(7), n):
            top = max(rewards[i] for i in subset)
            found.append(np.mean([qualities[i] for i in subset if rewards[i] == top]))
        assert expected_best(list(rewards), list(qualities), n) == pytest.approx(np.mean(found))


def test_equal_rewards_are_a_random_choice() -> None:
    assert expected_best([1, 1, 1], [0, 3, 6], 2) == pytest.approx(3)


@pytest.mark.parametrize("n", [0, 4])
def test_n_must_fit(n: int) -> None:
    with pytest.raises(ValueError, match=f"`n` is {n}; it must be between 1 and the number of answers, 3"):
        expected_best([1, 2, 3], [1, 2, 3], n)


def test_rewards_must_be_numbers() -> None:
    with pytest.raises(ValueError, match="not finite"):
        expected_best([1, float("nan")], [1, 2], 1)


@pytest.mark.parametrize("method", ["round_robin", "linear", "bracket"])
def test_a_transitive_judge_chooses_as_its_rewards_would(method: str) -> None:
    """With P(i beats j) above one half whenever reward i is larger, every method takes the largest reward."""
    rewards, qualities = [0.2, 1.5, -1.0, 0.9], [4.0, 1.0, 2.0, 8.0]
    probabilities = {
        (i, j): 0.5 + 0.1 * np.sign(rewards[i] - rewards[j]) for i, j in combinations(range(4), 2)
    }
    found = best_by_judge(probabilities, qualities, 4, method=method, draws=5, rng=Random(0))  # type: ignore[arg-type]
    assert found == qualities[1]
    drawn = best_by_judge(probabilities, qualities, 2, method=method, draws=4000, rng=Random(0))  # type: ignore[arg-type]
    assert drawn == pytest.approx(expected_best(rewards, qualities, 2), abs=0.15)
