"""Best-of-n: the answer with the highest reward among n, and what that gains on answers of known quality.

Spec section 6. The curve is an expectation over all subsets (`models.gram.best_of_n`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from eagleray.models.gram.alignment import kl_best_of_n
from eagleray.models.gram.best_of_n import expected_curve, sweep_up_to
from eagleray.models.gram.metrics import mean_estimate
from eagleray.models.rovrm.records import VisualPreference

LEAST_CANDIDATES = 4
"""Answers that a picture and prompt need to stand in a curve."""


@dataclass(frozen=True)
class Candidates:
    """Answers to one prompt about one picture, of known quality."""

    rewards: Sequence[float]
    qualities: Sequence[float]
    """How good each answer is; for facts 1 if true, else 0."""


def best_of(rewards: Sequence[float]) -> int:
    """Position of the highest reward; the first of several.

    Raises:
        ValueError: There is none, or one is not a number.
    """
    if not len(rewards) or not np.isfinite(np.asarray(rewards, dtype=np.float64)).all():
        raise ValueError(f"There are {len(rewards)} rewards, or one is not finite; best-of-n needs numbers.")
    return int(np.argmax(np.asarray(rewards, dtype=np.float64)))


def best_of_n_curve(
    groups: Sequence[Candidates], *, samples: int = 1000, seed: int = 0
) -> list[dict[str, Any]]:
    """Expected quality and reward of the best of n, for each n that all groups can give.

    `value` is the quality, between `low` and `high`, the 95 % interval of a bootstrap over groups. `random` is the quality of an answer
    taken by chance, `gain` what the choice adds to it in the same groups, with its interval, and `oracle` the quality of a perfect
    reward. Among equal rewards each answer is taken with the same probability.

    Args:
        groups: One for each prompt and picture.
        samples: Bootstrap replicates of an interval.
        seed: Of the bootstrap.

    Raises:
        ValueError: There is no group.
    """
    if not groups:
        raise ValueError("There is no group of candidates; best-of-n needs several answers to one prompt.")
    sweep = sweep_up_to(min(len(group.rewards) for group in groups))
    rewards, qualities = [g.rewards for g in groups], [g.qualities for g in groups]
    quality_GK = expected_curve(rewards, qualities, sweep)
    reward_K = expected_curve(rewards, rewards, sweep).mean(0)
    oracle_K = expected_curve(qualities, qualities, sweep).mean(0)
    random_G = np.array([np.mean(values) for values in qualities])
    curve = []
    for i, n in enumerate(sweep):
        quality = mean_estimate(quality_GK[:, i], samples=samples, seed=seed)
        gain = mean_estimate(quality_GK[:, i] - random_G, samples=samples, seed=seed)
        curve.append(
            {
                "n": n,
                "kl": kl_best_of_n(n),
                "reward": float(reward_K[i]),
                **asdict(quality),
                "random": float(random_G.mean()),
                "gain": asdict(gain),
                "oracle": float(oracle_K[i]),
            }
        )
    return curve


def group_candidates(
    records: Sequence[VisualPreference], rewards: Sequence[Sequence[float]], *, least: int = LEAST_CANDIDATES
) -> list[Candidates]:
    """Pairs about the same picture and prompt as one set of candidates: chosen answers are worth 1, others 0.

    Args:
        records: Pairs, the better answer first.
        rewards: Of the answers of each record.
        least: Smaller sets are left out.
    """
    found: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    for record, values in zip(records, rewards, strict=True):
        if record.image is None:
            continue
        answers = found.setdefault((record.image, record.prompt), {})
        for place, (answer, value) in enumerate(zip(record.responses, values, strict=True)):
            answers[answer] = (value, float(place == 0))
    return [
        Candidates(*map(list, zip(*answers.values(), strict=True)))  # type: ignore[arg-type]
        for answers in found.values()
        if len(answers) >= least
    ]
