"""A small n-gram language model over token ids, for the beam search: interpolated, Witten-Bell smoothing.

    P(w | h) = (c(h w) + N(h) P(w | h')) / (c(h) + N(h)),

with c counts, N(h) the number of different tokens seen after h, and h' the context without its first token; below the
unigrams lies the uniform distribution. It sums to one over the vocabulary.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

BEGIN = -1
"""Stands before the first token of every sequence."""


class NgramModel:
    """Counts of n-grams and the probabilities they give."""

    def __init__(self, counts: dict[tuple[int, ...], int], *, order: int, vocab_size: int) -> None:
        if order < 1 or vocab_size < 1:
            raise ValueError(f"`order` is {order} and `vocab_size` {vocab_size}; both must be at least 1.")
        self.counts, self.order, self.vocab_size = counts, order, vocab_size
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._kinds: Counter[tuple[int, ...]] = Counter()
        for ngram, count in counts.items():
            self._seen[ngram[:-1]] += count
            self._kinds[ngram[:-1]] += 1
        self._probability = lru_cache(maxsize=2**20)(self._compute)

    @classmethod
    def train(cls, sequences: Iterable[Sequence[int]], *, order: int = 3, vocab_size: int) -> NgramModel:
        """Count the n-grams of all orders up to `order` in token sequences."""
        counts: Counter[tuple[int, ...]] = Counter()
        for tokens in sequences:
            padded = (*[BEGIN] * (order - 1), *tokens)
            for end in range(order, len(padded) + 1):
                for size in range(1, order + 1):
                    counts[padded[end - size : end]] += 1
        return cls(dict(counts), order=order, vocab_size=vocab_size)

    def log_prob(self, token: int, context: Sequence[int]) -> float:
        """Natural log-probability of a token after all tokens before it."""
        size = self.order - 1
        recent = tuple(context[len(context) - size :]) if len(context) > size else tuple(context)
        history = ((BEGIN,) * (size - len(recent)) + recent) if size else ()
        return self._probability((*history, token))

    def save(self, path: str | Path) -> None:
        """Write the counts as JSON."""
        rows = [[*ngram, count] for ngram, count in self.counts.items()]
        content = {"order": self.order, "vocab_size": self.vocab_size, "counts": rows}
        Path(path).write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> NgramModel:
        """Read what `save` wrote."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        counts = {tuple(row[:-1]): row[-1] for row in content["counts"]}
        return cls(counts, order=content["order"], vocab_size=content["vocab_size"])

    def _compute(self, ngram: tuple[int, ...]) -> float:
        probability = 1.0 / self.vocab_size
        for size in range(1, len(ngram) + 1):
            tail = ngram[-size:]
            kinds = self._kinds[tail[:-1]]
            if kinds == 0:
                break  # this context was never seen, nor any longer one
            probability = (self.counts.get(tail, 0) + kinds * probability) / (self._seen[tail[:-1]] + kinds)
        return math.log(probability)
