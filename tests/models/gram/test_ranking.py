"""Acceptance check 19: all methods on judges made of scalar scores, and on judges that prefer in circles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import pytest

from eagleray.models.gram.ranking import Method, rank


@dataclass(frozen=True)
class Verdict:
    p_a: float


class FakeJudge:
    """Prefers by a table of scores, or by a rule; remembers the size of each call."""

    def __init__(self, rule) -> None:  # type: ignore[no-untyped-def]
        self.rule, self.calls = rule, []

    @classmethod
    def of_scores(cls, scores: dict[str, float]) -> FakeJudge:
        return cls(lambda a, b: 1 / (1 + math.exp(scores[b] - scores[a])))

    def __call__(self, pairs: Sequence[tuple[str, str, str]]) -> list[Verdict]:
        assert all(prompt == "q" for prompt, _, _ in pairs)
        self.calls.append(len(pairs))
        return [Verdict(self.rule(a, b)) for _, a, b in pairs]


CIRCLE = {("a", "b"): 0.9, ("b", "c"): 0.9, ("c", "a"): 0.9}


def circular(a: str, b: str) -> float:
    return CIRCLE.get((a, b), 1 - CIRCLE.get((b, a), 0.5))


SCORES = {"a": -1.0, "b": 2.0, "c": 0.5, "d": 1.5, "e": -0.3}


@pytest.mark.parametrize(
    ("method", "comparisons", "calls"), [("linear", 4, 4), ("bracket", 4, 3), ("round_robin", 10, 1)]
)
def test_check_19_all_methods_find_the_best(method: Method, comparisons: int, calls: int) -> None:
    for answers in permutations(SCORES):
        judge = FakeJudge.of_scores(SCORES)
        ranking = rank(judge, "q", answers, method=method)
        assert answers[ranking.best] == "b"
        assert ranking.order[0] == ranking.best
        assert sorted(ranking.order) == list(range(5))
        assert ranking.comparisons == sum(judge.calls) == comparisons
        assert len(judge.calls) == calls


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9])
def test_check_19_numbers_of_comparisons(n: int) -> None:
    scores = {str(i): float(i * 7 % 11) for i in range(n)}
    expected: dict[Method, int] = {"linear": n - 1, "bracket": n - 1, "round_robin": n * (n - 1) // 2}
    for method, comparisons in expected.items():
        ranking = rank(FakeJudge.of_scores(scores), "q", list(scores), method=method)
        assert ranking.comparisons == comparisons
        assert ranking.best == max(range(n), key=lambda i: i * 7 % 11)


@pytest.mark.parametrize("method", ["linear", "bracket", "round_robin"])
def test_check_19_a_circle_is_reported(method: Method) -> None:
    for answers in permutations("abc"):
        ranking = rank(FakeJudge(circular), "q", answers, method=method, verify_best=True)
        assert ranking.intransitive is True
        assert sorted(ranking.order) == [0, 1, 2]
        assert ranking.comparisons == 3


@pytest.mark.parametrize("method", ["linear", "bracket"])
def test_too_few_comparisons_to_see_a_circle_are_not_called_transitive(method: Method) -> None:
    assert rank(FakeJudge(circular), "q", "abc", method=method).intransitive is None
    assert rank(FakeJudge(circular), "q", "ab", method=method).intransitive is False
    verified = rank(FakeJudge.of_scores(SCORES), "q", list(SCORES), method=method, verify_best=True)
    assert verified.intransitive is False
    assert verified.comparisons <= 2 * (len(SCORES) - 1)


def test_round_robin_scores_are_mean_rewards() -> None:
    ranking = rank(FakeJudge(circular), "q", "abc")
    assert ranking.scores == pytest.approx((0.5, 0.5, 0.5))
    ranking = rank(FakeJudge.of_scores(SCORES), "q", list(SCORES))
    assert ranking.order == (1, 3, 2, 4, 0)
    assert ranking.intransitive is False
    assert ranking.scores is not None
    sigmoid = [1 / (1 + math.exp(SCORES[other] - SCORES["a"])) for other in "bcde"]
    assert ranking.scores[0] == pytest.approx(sum(sigmoid) / 4)


def test_reference_scores() -> None:
    judge = FakeJudge.of_scores({**SCORES, "ref": 0.0})
    ranking = rank(judge, "q", list(SCORES), method="reference", reference="ref")
    assert ranking.order == (1, 3, 2, 4, 0)
    assert ranking.scores == pytest.approx([1 / (1 + math.exp(-score)) for score in SCORES.values()])
    assert (ranking.comparisons, judge.calls, ranking.intransitive) == (5, [5], None)


@pytest.mark.parametrize("method", ["linear", "bracket", "round_robin"])
def test_ties_keep_the_earlier_answer(method: Method) -> None:
    ranking = rank(FakeJudge(lambda a, b: 0.5), "q", "xyz", method=method, verify_best=True)
    assert ranking.best == 0
    assert ranking.intransitive is False


@pytest.mark.parametrize("method", ["linear", "bracket"])
def test_order_agrees_with_the_comparisons_made(method: Method) -> None:
    for answers in permutations(SCORES):
        seen: list[tuple[str, str]] = []

        def rule(a: str, b: str, seen: list[tuple[str, str]] = seen) -> float:
            seen.append((a, b) if SCORES[a] > SCORES[b] else (b, a))
            return float(SCORES[a] > SCORES[b])

        order = [answers[i] for i in rank(FakeJudge(rule), "q", answers, method=method).order]
        assert all(order.index(winner) < order.index(loser) for winner, loser in seen)


def test_errors() -> None:
    judge = FakeJudge(circular)
    with pytest.raises(ValueError, match="`answers` is empty"):
        rank(judge, "q", [])
    with pytest.raises(ValueError, match="`method` is 'reference' and `reference` is missing"):
        rank(judge, "q", "ab", method="reference")
    with pytest.raises(ValueError, match="`method` is 'linear' and `reference` is given"):
        rank(judge, "q", "ab", method="linear", reference="c")
    with pytest.raises(ValueError, match="must be one of reference, linear, bracket, round_robin"):
        rank(judge, "q", "ab", method="elo")  # type: ignore[arg-type]
