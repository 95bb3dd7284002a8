"""How good translations are: BLEU and chrF with signatures, word error rate, lengths, re-ordering, intervals.

Texts are detokenised and cased. Intervals resample whole utterances (percentile bootstrap).

Shapes: N utterances, K columns of statistics, R replicates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np
from sacrebleu.metrics.bleu import BLEU, MAX_NGRAM_ORDER
from sacrebleu.metrics.chrf import CHRF
from torch import Tensor

from eagleray.models.nast.alignment import required_frames

LENGTH_EDGES = (0, 5, 10, 20, 40, 1000)
"""Edges of the buckets of words in the reference."""
REORDERING_EDGES = (0.0, 0.1, 0.2, 0.3, 1.0)
"""Edges of the buckets of Kendall tau distance; the first holds the monotone utterances alone."""


class Estimate(NamedTuple):
    """A figure with its bootstrap interval."""

    value: float
    low: float
    high: float


class CorpusScore(NamedTuple):
    """A corpus figure of sacrebleu and the signature to report with it."""

    score: float
    signature: str


def bleu(hypotheses: Sequence[str], references: Sequence[str], *, language: str = "") -> CorpusScore:
    """Case-sensitive corpus BLEU; `zh` and `ja` have tokenisers of their own, all else 13a.

    >>> hyps = ["Das ist ein Test .", "Wir gehen nach Hause, heute."]
    >>> round(bleu(hyps, ["Das ist ein Test.", "Wir gehen heute nach Hause."]).score, 4)
    51.2057
    """
    _check_pairs(hypotheses, references)
    metric = _bleu_metric(language)
    score = metric.corpus_score(hypotheses, [references]).score
    return CorpusScore(score, str(metric.get_signature()))


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> CorpusScore:
    """Corpus chrF2."""
    _check_pairs(hypotheses, references)
    metric = CHRF()
    score = metric.corpus_score(hypotheses, [references]).score
    return CorpusScore(score, str(metric.get_signature()))


def bleu_estimate(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    language: str = "",
    samples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Corpus BLEU with its interval; the n-gram counts of drawn utterances are summed, so no text is scored twice."""
    _check_pairs(hypotheses, references)
    metric = _bleu_metric(language, effective_order=True)  # no matter here: only the counts are read
    rows = [metric.sentence_score(h, [r]) for h, r in zip(hypotheses, references, strict=True)]
    statistics_NK = np.array([[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in rows])

    def score(sums_K: np.ndarray) -> float:
        counts, totals, lengths = np.split(sums_K, [MAX_NGRAM_ORDER, 2 * MAX_NGRAM_ORDER])
        return BLEU.compute_bleu(
            counts.tolist(), totals.tolist(), int(lengths[0]), int(lengths[1]), smooth_method="exp"
        ).score

    return _bootstrap(score, statistics_NK, samples=samples, seed=seed)


def word_error_rate(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Edits over reference words, on whitespace-separated words as they are.

    Raises:
        ValueError: No reference has a word.
    """
    return _ratio(_word_edits(hypotheses, references).sum(0))


def word_error_estimate(
    hypotheses: Sequence[str], references: Sequence[str], *, samples: int = 1000, seed: int = 0
) -> Estimate:
    """Word error rate with its interval."""
    return _bootstrap(_ratio, _word_edits(hypotheses, references), samples=samples, seed=seed)


def exact_match(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Share of utterances translated word for word as the reference."""
    _check_pairs(hypotheses, references)
    return float(np.mean([h.split() == r.split() for h, r in zip(hypotheses, references, strict=True)]))


def exact_match_estimate(
    hypotheses: Sequence[str], references: Sequence[str], *, samples: int = 1000, seed: int = 0
) -> Estimate:
    """Exact match with its interval."""
    _check_pairs(hypotheses, references)
    right_N1 = np.array([[h.split() == r.split()] for h, r in zip(hypotheses, references, strict=True)])
    size = len(right_N1)
    return _bootstrap(lambda sums: float(sums[0] / size), right_N1.astype(float), samples=samples, seed=seed)


def length_ratio(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Words of all hypotheses over words of all references."""
    _check_pairs(hypotheses, references)
    return _ratio(np.array([sum(len(t.split()) for t in texts) for texts in (hypotheses, references)]))


def infeasible_share(lengths_B: Tensor, labels_BU: Tensor, label_lengths_B: Tensor) -> float:
    """Share of clips with fewer frames (after subsampling) than CTC needs; their loss is zero."""
    return (required_frames(labels_BU, label_lengths_B) > lengths_B).float().mean().item()


def edit_distance(hypothesis: Sequence[object], reference: Sequence[object]) -> int:
    """Insertions, deletions and substitutions between two sequences.

    >>> edit_distance("kitten", "sitting")
    3
    """
    numbers: dict[object, int] = {}
    ids = np.array([numbers.setdefault(item, len(numbers)) for item in reference])
    offsets = np.arange(len(reference) + 1)
    row = offsets
    for position, item in enumerate(hypothesis, start=1):
        different = ids != numbers.get(item, -1)
        best = np.concatenate([[position], np.minimum(row[:-1] + different, row[1:] + 1)])
        # Insertions cost one a step along the row: a running minimum of what is left without these steps.
        row = np.minimum.accumulate(best - offsets) + offsets
    return int(row[-1])


def kendall_tau_distance(source_positions: Sequence[int]) -> float:
    """Share of pairs of target words whose source words stand in the other order: 0 monotone, 1 reversed.

    >>> kendall_tau_distance([0, 2, 1]), kendall_tau_distance([2, 1, 0]), kendall_tau_distance([5])
    (0.3333333333333333, 1.0, 0.0)
    """
    pairs = list(combinations(source_positions, 2))
    return sum(first > second for first, second in pairs) / len(pairs) if pairs else 0.0


def by_bucket(
    values: Sequence[float], edges: Sequence[float], score: Callable[[list[int]], float]
) -> list[dict[str, float]]:
    """A figure for each bucket of a property, e.g. BLEU by length or by Kendall tau distance.

    Args:
        values: The property of each utterance.
        edges: Buckets are (edge, next edge], the first one includes its lower edge alone: [edge, edge].
        score: From the indices of a bucket's utterances to the figure.

    Returns:
        Rows `from`, `to`, `count`, `score`; empty buckets are left out.
    """
    rows = []
    for low, high in [(edges[0], edges[0]), *pairwise(edges)]:
        inside = [i for i, v in enumerate(values) if low < v <= high or v == low == high]
        if inside:
            rows.append({"from": low, "to": high, "count": float(len(inside)), "score": score(inside)})
    return rows


def _bleu_metric(language: str, *, effective_order: bool = False) -> BLEU:
    tokenize = {"zh": "zh", "ja": "ja-mecab"}.get(language, "13a")
    return BLEU(tokenize=tokenize, effective_order=effective_order)


def _word_edits(hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
    _check_pairs(hypotheses, references)
    return np.array(
        [
            [edit_distance(h.split(), r.split()), len(r.split())]
            for h, r in zip(hypotheses, references, strict=True)
        ]
    )


def _ratio(sums_2: np.ndarray) -> float:
    if sums_2[1] == 0:
        raise ValueError("The references have no words; give at least one that is not empty.")
    return float(sums_2[0] / sums_2[1])


def _bootstrap(
    score: Callable[[np.ndarray], float], statistics_NK: np.ndarray, *, samples: int, seed: int
) -> Estimate:
    size = len(statistics_NK)
    weights_RN = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=samples)
    replicates = [score(sums) for sums in weights_RN @ statistics_NK]
    low, high = np.quantile(replicates, [0.025, 0.975])
    return Estimate(score(statistics_NK.sum(0)), float(low), float(high))


def _check_pairs(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if not len(hypotheses) == len(references) > 0:
        raise ValueError(
            f"There are {len(hypotheses)} hypotheses and {len(references)} references; there must be one reference "
            "for each hypothesis, and at least one pair."
        )
