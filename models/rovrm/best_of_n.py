"""Best-of-n: the answer with the highest reward among n, and what that gains on answers of known quality.

Spec section 6. Shapes: N answers of one prompt, in the order they were sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from eagleray.models.gram.alignment import kl_best_of_n
from eagleray.models.rovrm.records import VisualPreference

SWEEP = (1, 2, 4, 8, 16, 32)
"""Numbers of samples that a curve is drawn for."""


@dataclass(frozen=True)
class Candidates:
    """Answers to one prompt about one picture, of known quality."""

    id: str
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
    groups: Sequence[Candidates], *, sweep: Sequence[int] = SWEEP, draws: int = 20, seed: int = 0
) -> list[dict[str, float]]:
    """Mean quality and mean reward of the best of n, for each n that all groups can give.

    The n answers are the first of an order drawn by the seed and the group's id, so the samples for n lie in those for
    2n. `random` is the quality at n = 1 in the limit, `oracle` that of a perfect reward.

    Args:
        groups: Candidates of each prompt.
        sweep: Values of n; those above the smallest group are left out.
        draws: Orders drawn for each group.
        seed: Of the orders.

    Raises:
        ValueError: There is no group.
    """
    if not groups:
        raise ValueError("There is no group of candidates; best-of-n needs several answers to one prompt.")
    most = min(len(group.rewards) for group in groups)
    orders = [_orders(group, draws, seed) for group in groups]
    rows = []
    for n in (n for n in sweep if n <= most):
        reward, quality, oracle = [], [], []
        for group, drawn in zip(groups, orders, strict=True):
            for order in drawn:
                shown = order[:n]
                chosen = shown[best_of([group.rewards[i] for i in shown])]
                reward.append(group.rewards[chosen])
                quality.append(group.qualities[chosen])
                oracle.append(max(group.qualities[i] for i in shown))
        rows.append(
            {
                "n": n,
                "kl": kl_best_of_n(n),
                "reward": float(np.mean(reward)),
                "quality": float(np.mean(quality)),
                "oracle": float(np.mean(oracle)),
                "random": float(np.mean([np.mean(group.qualities) for group in groups])),
            }
        )
    return rows


def group_candidates(
    records: Sequence[VisualPreference], rewards: Sequence[Sequence[float]], *, least: int = 4
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
        Candidates(image, *map(list, zip(*answers.values(), strict=True)))  # type: ignore[arg-type]
        for (image, _), answers in found.items()
        if len(answers) >= least
    ]


def _orders(group: Candidates, draws: int, seed: int) -> list[list[int]]:
    rng = Random(f"{seed} {group.id}")
    return [rng.sample(range(len(group.rewards)), len(group.rewards)) for _ in range(draws)]
