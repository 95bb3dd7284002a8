"""How good a visual reward model is on ranked answers: accuracy by source, calibration, length.

The figures of one set are GRAM's (`models.gram.metrics`); here are what they are taken of and what a visual model needs
besides. Shapes: N pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from eagleray.models.gram.judge import Comparison, read_out
from eagleray.models.gram.metrics import evaluate_comparisons, mean_estimate
from eagleray.models.rovrm.records import VisualPreference


@dataclass(frozen=True)
class RankedPair:
    """Two answers of a record, the better one first, with their rewards."""

    record: VisualPreference
    source: str
    better: str
    worse: str
    reward_better: float
    reward_worse: float

    @property
    def cluster(self) -> str:
        """What is drawn together in a bootstrap: all pairs about one picture, or of one prompt without a picture."""
        return self.record.image or self.record.origin or self.record.prompt

    @property
    def comparison(self) -> Comparison:
        """p(better) = σ(difference of rewards), the same in both orders."""
        difference = self.reward_better - self.reward_worse
        return read_out(difference, -difference)


def ranked_pairs(
    records: Sequence[VisualPreference], sources: Sequence[str], rewards: Sequence[Sequence[float]]
) -> list[RankedPair]:
    """Every two answers of every record; k ranked answers give k (k − 1) / 2 pairs."""
    return [
        RankedPair(record, source, record.responses[i], record.responses[j], values[i], values[j])
        for record, source, values in zip(records, sources, rewards, strict=True)
        for i, j in combinations(range(len(record.responses)), 2)
    ]


def evaluate_pairs(pairs: Sequence[RankedPair], *, samples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """All figures of one scorer on one set, ready for JSON.

    `by_source` and `by_group` hold the accuracy of each part with its interval, `macro_accuracy` the plain mean over
    sources, so that a large one does not drown the others; `macro_accuracy_by_group` is the figure of VL-RewardBench.
    """
    options: dict[str, Any] = {"samples": samples, "seed": seed}
    report = evaluate_comparisons(
        [pair.comparison for pair in pairs],
        prompts=[pair.cluster for pair in pairs],
        length_gaps=[len(pair.better) - len(pair.worse) for pair in pairs],
        **options,
    )
    report["by_source"] = _accuracy_by([pair.source for pair in pairs], pairs, options)
    report["by_group"] = _accuracy_by([pair.record.group for pair in pairs], pairs, options)
    for name, part in (("macro_accuracy", "by_source"), ("macro_accuracy_by_group", "by_group")):
        report[name] = float(np.mean([row["value"] for row in report[part].values()]))
    report["length_correlation"] = length_correlation(pairs)
    return report


def length_correlation(pairs: Sequence[RankedPair]) -> float | None:
    """Spearman correlation of the difference in reward with the difference in length, both in a fixed order.

    The answers of a pair are taken in the order of their texts, which says nothing about the better one: a scorer that
    only likes length gets 1. None where either does not vary.
    """
    rewards_N, lengths_N = [], []
    for pair in pairs:
        sign = 1 if pair.better < pair.worse else -1
        rewards_N.append(sign * (pair.reward_better - pair.reward_worse))
        lengths_N.append(sign * (len(pair.better) - len(pair.worse)))
    if len(set(rewards_N)) < 2 or len(set(lengths_N)) < 2:
        return None
    return float(spearmanr(rewards_N, lengths_N)[0])  # type: ignore[arg-type]


def _accuracy_by(
    labels: Sequence[str], pairs: Sequence[RankedPair], options: dict[str, Any]
) -> dict[str, Any]:
    parts: dict[str, list[RankedPair]] = {}
    for label, pair in zip(labels, pairs, strict=True):
        parts.setdefault(label, []).append(pair)
    return {
        label: asdict(
            mean_estimate(
                [pair.reward_better > pair.reward_worse for pair in part],
                clusters=[pair.cluster for pair in part],
                **options,
            )
        )
        | {"pairs": len(part)}
        for label, part in sorted(parts.items())
    }
