"""What best-of-n gains on answers of known quality, without drawing lots where a sum will do.

Of N answers to a prompt, n are drawn without replacement and the best by some reward is taken. For a reward that is a
number for each answer, the expectation over all C(N, n) subsets is a sum over ranks: the answer that m others do not beat is
taken with probability C(m, n-1) / C(N, n). A pairwise judge has no such number; its winner is found for drawn subsets,
from comparisons made once for all pairs.

Section 5 of the GRAM specification. Shapes: N answers of one prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from random import Random

import numpy as np

from eagleray.models.gram.ranking import Method, rank

SWEEP = (1, 2, 4, 8, 16, 32, 64, 128)
"""Numbers of answers that a curve is drawn for."""


def sweep_up_to(most: int) -> list[int]:
    """Numbers of answers to draw a curve for where every prompt has `most`: those of `SWEEP` below it, and it.

    >>> sweep_up_to(5), sweep_up_to(4)
    ([1, 2, 4, 5], [1, 2, 4])
    """
    return [*(n for n in SWEEP if n < most), most]


def expected_best(rewards: Sequence[float], qualities: Sequence[float], n: int) -> float:
    """Expected quality of the answer with the highest reward among n drawn without replacement; exact.

    Among equal rewards each is taken with the same probability.

    Args:
        rewards: What the answers are chosen by, N numbers.
        qualities: How good they are, N numbers.
        n: Answers drawn, 1 to N.

    Raises:
        ValueError: `n` is out of range, or a reward is not a number.

    >>> expected_best([1.0, 2.0, 3.0], [10.0, 20.0, 60.0], 2)  # {1,2} -> 20, {1,3} and {2,3} -> 60
    46.666666666666664
    """
    reward_N, quality_N = (np.asarray(x, dtype=np.float64) for x in (rewards, qualities))
    total = len(reward_N)
    if not 1 <= n <= total:
        raise ValueError(f"`n` is {n}; it must be between 1 and the number of answers, {total}.")
    if not np.isfinite(reward_N).all():
        raise ValueError("A reward is not finite; best-of-n needs numbers.")
    below, expected = 0, 0.0
    for value in np.unique(reward_N):
        group = reward_N == value
        upto = below + int(group.sum())
        share = (comb(upto, n) - comb(below, n)) / comb(total, n)
        expected += share * float(quality_N[group].mean())
        below = upto
    return expected


def expected_curve(
    rewards: Sequence[Sequence[float]], qualities: Sequence[Sequence[float]], sweep: Sequence[int]
) -> np.ndarray:
    """`expected_best` of each prompt for each n of `sweep`, [prompts, len(sweep)]."""
    groups = list(zip(rewards, qualities, strict=True))
    return np.array([[expected_best(r, q, n) for n in sweep] for r, q in groups])


@dataclass(frozen=True)
class _Known:
    p_a: float


def best_by_judge(
    probabilities: Mapping[tuple[int, int], float],
    qualities: Sequence[float],
    n: int,
    *,
    method: Method,
    draws: int,
    rng: Random,
) -> float:
    """Mean quality of the winner among n drawn answers, by a pairwise judge.

    Args:
        probabilities: For i < j the probability that answer i is better than answer j.
        qualities: How good the answers are.
        n: Answers drawn, 1 to N.
        method: `linear`, `bracket` or `round_robin`.
        draws: Subsets drawn, each in an order that is drawn too; one is enough where the order does not matter and
            n is N.
        rng: Draws them.
    """
    total = len(qualities)
    if n == total and method == "round_robin":
        draws = 1
    names = [str(i) for i in range(total)]

    def compare(pairs: Sequence[tuple[str, str, str]]) -> list[_Known]:
        return [_Known(_probability(probabilities, int(first), int(second))) for _, first, second in pairs]

    found = 0.0
    for _ in range(draws):
        drawn = rng.sample(range(total), n)
        best = rank(compare, "", [names[i] for i in drawn], method=method).best
        found += qualities[drawn[best]]
    return found / draws


def _probability(probabilities: Mapping[tuple[int, int], float], first: int, second: int) -> float:
    if first < second:
        return probabilities[first, second]
    return 1 - probabilities[second, first]
