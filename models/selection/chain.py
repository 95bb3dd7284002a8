"""Selecting backwards through phases: what is chosen for a phase is the target of the phase before it (RoVRM section 4.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from eagleray.models.selection.rows import Rows


@dataclass(frozen=True)
class FeatureSet:
    """Rows with their ids."""

    name: str
    ids: list[str]
    rows: Rows | None
    """Features; None for selections that need none."""

    def take(self, numbers: np.ndarray) -> FeatureSet:
        """These rows alone, in this order."""
        rows = None if self.rows is None else self.rows[numbers]
        return FeatureSet(self.name, [self.ids[number] for number in numbers], rows)


def select_chain(
    target: FeatureSet,
    pools: Sequence[FeatureSet],
    select: Callable[[FeatureSet, FeatureSet], np.ndarray],
    *,
    chained: bool = True,
) -> list[np.ndarray]:
    """Select from each pool in turn.

    Args:
        target: What the first pool is matched to.
        pools: The pools, beginning with that of the phase right before the target's.
        select: Numbers of the rows to take from a pool, given the pool and its target.
        chained: Whether the rows taken from a pool are the target of the next pool; else `target` stays it.

    Returns:
        What `select` gave for each pool.
    """
    chosen = []
    for pool in pools:
        chosen.append(select(pool, target))
        if chained:
            target = pool.take(chosen[-1])
    return chosen
