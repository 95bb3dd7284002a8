"""Ranking n answers with a pairwise judge: reference, linear scan, knock-out bracket, round robin.

Section 5 of the GRAM specification. The functions see the judge only as a callable, so any pair scorer can
rank. A pairwise judge may prefer in circles (a over b over c over a); what can be seen of that is reported as
`intransitive`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Literal, Protocol, get_args

Method = Literal["reference", "linear", "bracket", "round_robin"]
PARITY = 0.5


class HasProbability(Protocol):
    """What ranking needs of a comparison: the probability that the first answer is better."""

    @property
    def p_a(self) -> float: ...


Compare = Callable[[Sequence[tuple[str, str, str]]], Sequence[HasProbability]]


@dataclass(frozen=True)
class Ranking:
    """The outcome of `rank`; answers are named by their index."""

    best: int
    order: tuple[int, ...]
    """Best first. Agrees with every comparison made unless the judge is intransitive; `linear` and `bracket`
    make too few comparisons to establish more than the first place."""
    scores: tuple[float, ...] | None
    """By answer: reward against the reference, or mean reward against the others (`round_robin`)."""
    comparisons: int
    intransitive: bool | None
    """True: the comparisons made contain a circle. False: there is none through the winner (`round_robin`:
    none at all). None: too few comparisons were made to tell."""


def rank(
    compare: Compare,
    prompt: str,
    answers: Sequence[str],
    *,
    method: Method = "round_robin",
    reference: str | None = None,
    verify_best: bool = False,
) -> Ranking:
    """Rank answers to one prompt.

    Args:
        compare: Judges (prompt, first, second) triples; called once a round, with the whole round.
        prompt: The request.
        answers: The candidates; at least one.
        method: `reference` scores each against one reference (n comparisons, one round); `linear` keeps an
            incumbent that a challenger must beat, ties stay (n - 1, one a round); `bracket` is a knock-out,
            ties go to the earlier answer (n - 1 in log2 n rounds); `round_robin` compares all pairs
            (n (n - 1) / 2, one round).
        reference: The reference answer, for `reference` only.
        verify_best: After `linear` or `bracket`, compare the winner with each answer it has not met, which
            shows every circle through it (at most n - 1 more comparisons).
    """
    if not answers:
        raise ValueError("`answers` is empty; give at least one answer to rank.")
    if (method == "reference") != (reference is not None):
        raise ValueError(
            f"`method` is {method!r} and `reference` is {'missing' if reference is None else 'given'}; "
            "a reference answer belongs to method 'reference', and only to it."
        )
    judge = _Recorder(compare, prompt, answers)
    if method == "reference":
        return _against_reference(compare, prompt, answers, str(reference))
    if method == "round_robin":
        return _round_robin(judge)
    if method == "linear":
        order = _linear(judge)
    elif method == "bracket":
        order = _bracket(judge)
    else:
        raise ValueError(f"`method` is {method!r}; it must be one of {', '.join(get_args(Method))}.")
    best = order[0]
    if verify_best:
        judge.play([(best, other) for other in order[1:] if (best, other) not in judge.results])
    return Ranking(best, tuple(order), None, judge.comparisons, judge.circle(complete=verify_best))


class _Recorder:
    """Plays rounds of comparisons between answers and remembers the outcomes."""

    def __init__(self, compare: Compare, prompt: str, answers: Sequence[str]) -> None:
        self._compare, self._prompt, self._answers = compare, prompt, answers
        self.size = len(answers)
        self.comparisons = 0
        self.results: dict[tuple[int, int], float] = {}

    def play(self, pairs: Sequence[tuple[int, int]]) -> list[float]:
        """Probability that the first of each pair is better, all in one call of the judge."""
        if not pairs:
            return []
        triples = [(self._prompt, self._answers[i], self._answers[j]) for i, j in pairs]
        probabilities = [float(result.p_a) for result in self._compare(triples)]
        for (i, j), probability in zip(pairs, probabilities, strict=True):
            # The complement holds for a judge that averages both orders.
            self.results[i, j], self.results[j, i] = probability, 1 - probability
        self.comparisons += len(pairs)
        return probabilities

    def circle(self, *, complete: bool) -> bool | None:
        """Whether strict preferences run in a circle; if none was seen, False only if `complete`."""
        graph = TopologicalSorter(
            {i: {j for j in range(self.size) if self._beats(j, i)} for i in range(self.size)}
        )
        try:
            graph.prepare()
        except CycleError:
            return True
        return False if complete or self.size < 3 else None

    def _beats(self, i: int, j: int) -> bool:
        return self.results.get((i, j), PARITY) > PARITY


def _against_reference(compare: Compare, prompt: str, answers: Sequence[str], reference: str) -> Ranking:
    scores = [float(result.p_a) for result in compare([(prompt, answer, reference) for answer in answers])]
    order = _by_score(scores)
    return Ranking(order[0], order, tuple(scores), len(answers), None if len(answers) > 1 else False)


def _round_robin(judge: _Recorder) -> Ranking:
    n = judge.size
    judge.play([(i, j) for i in range(n) for j in range(i + 1, n)])
    scores = [
        sum(judge.results[i, j] for j in range(n) if j != i) / (n - 1) if n > 1 else PARITY for i in range(n)
    ]
    order = _by_score(scores)
    return Ranking(order[0], order, tuple(scores), judge.comparisons, judge.circle(complete=True))


def _linear(judge: _Recorder) -> list[int]:
    incumbent, beaten = 0, []
    for challenger in range(1, judge.size):
        [probability] = judge.play([(challenger, incumbent)])
        loser, incumbent = (incumbent, challenger) if probability > PARITY else (challenger, incumbent)
        beaten.append(loser)
    return [incumbent, *reversed(beaten)]


def _bracket(judge: _Recorder) -> list[int]:
    alive, beaten = list(range(judge.size)), []
    while len(alive) > 1:
        pairs = list(zip(alive[::2], alive[1::2], strict=False))
        outcomes = judge.play(pairs)
        winners = [
            i if probability >= PARITY else j for (i, j), probability in zip(pairs, outcomes, strict=True)
        ]
        bye = alive[2 * len(pairs) :]
        beaten = [i for i in alive if i not in {*winners, *bye}] + beaten
        alive = winners + bye
    return [*alive, *beaten]


def _by_score(scores: Sequence[float]) -> tuple[int, ...]:
    return tuple(sorted(range(len(scores)), key=lambda i: -scores[i]))
