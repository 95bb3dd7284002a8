"""Which source word a target word comes from, by IBM model 1; how much an utterance re-orders follows from it.

The model knows words, not positions, so it does not prefer the order that is to be measured. It is learnt from the
texts that are evaluated; a target word that stands for no source word (IBM's empty word) has no place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from eagleray.models.nast.metrics import kendall_tau_distance

_EMPTY = ""


def reordering(sources: Sequence[str], targets: Sequence[str], *, rounds: int = 8) -> list[float]:
    """Kendall tau distance of each pair of texts: 0 is monotone, 1 reversed.

    Args:
        sources: Source texts.
        targets: Their translations.
        rounds: Rounds of expectation maximisation.
    """
    pairs = [([_EMPTY, *s.split()], t.split()) for s, t in zip(sources, targets, strict=True)]
    table = _learn(pairs, rounds)
    return [kendall_tau_distance(_positions(source, target, table)) for source, target in pairs]


def _learn(pairs: Sequence[tuple[list[str], list[str]]], rounds: int) -> dict[tuple[str, str], float]:
    """t(target word | source word)."""
    table: dict[tuple[str, str], float] = defaultdict(lambda: 1.0)
    for _ in range(rounds):
        counts: dict[tuple[str, str], float] = defaultdict(float)
        totals: dict[str, float] = defaultdict(float)
        for source, target in pairs:
            for word in target:
                norm = sum(table[word, origin] for origin in source)
                for origin in source:
                    share = table[word, origin] / norm
                    counts[word, origin] += share
                    totals[origin] += share
        table = defaultdict(float, {key: count / totals[key[1]] for key, count in counts.items()})
    return table


def _positions(source: list[str], target: list[str], table: dict[tuple[str, str], float]) -> list[int]:
    """Place of each target word's origin; words that come from the empty word are left out."""
    best = [max(range(len(source)), key=lambda i: (table[word, source[i]], -i)) for word in target]
    return [place for place in best if place]
