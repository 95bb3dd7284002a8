"""From scores to a selection: order, ties, how many, and quotas that keep it diverse.

Scores that agree to 1e-12 are ties, and ties go by ascending id: the selected set then depends neither on the order of
the pool nor on how it was split over workers (LRHP section 5, RoVRM section 4.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans

from eagleray.models.selection.rows import Rows, SelectionError

_DECIMALS = 12
_MINI_BATCH_FROM = 20_000


def best_first(scores_N: np.ndarray, ids: Sequence[str], *, highest: bool) -> np.ndarray:
    """Row numbers from best to worst.

    Args:
        scores_N: Score of each row.
        ids: Name of each row; decides among equal scores.
        highest: Whether the highest score is best (similarity) or the lowest (distance).

    >>> best_first(np.array([0.5, 0.9, 0.5]), ["c", "b", "a"], highest=True).tolist()
    [1, 2, 0]
    """
    keys = np.round(np.asarray(scores_N, dtype=np.float64), _DECIMALS)
    order = np.argsort(-keys if highest else keys, kind="stable")
    borders = np.flatnonzero(np.diff(keys[order])) + 1
    starts, stops = np.r_[0, borders], np.r_[borders, len(order)]
    for start, stop in zip(starts, stops, strict=True):
        if stop - start > 1:
            order[start:stop] = sorted(order[start:stop], key=lambda row: ids[int(row)])
    return order


def how_many(available: int, *, count: int | None = None, fraction: float | None = None) -> int:
    """Rows to select: `count`, or `fraction` of those there are, rounded.

    Raises:
        SelectionError: More rows are asked for than there are.
    """
    if (count is None) == (fraction is None):
        raise SelectionError("Give either `count` or `fraction` of the rows to select.")
    wanted = count if count is not None else int(np.floor((fraction or 0.0) * available + 0.5))
    if not 0 <= wanted <= available:
        raise SelectionError(
            f"{wanted} rows are to be selected from a pool of {available}. Lower `count`, or give a `fraction`."
        )
    return wanted


def take_by_quota(order: np.ndarray, groups_N: np.ndarray, count: int) -> np.ndarray:
    """The best rows of every group, as many as its share of the pool (largest remainders), best first.

    Args:
        order: Row numbers from best to worst.
        groups_N: Group of each row, 0 or more.
        count: Rows to take in all.

    Returns:
        `count` row numbers in the order of `order`.
    """
    sizes = np.bincount(groups_N)
    exact = sizes * (count / len(groups_N))
    quotas = np.floor(exact).astype(int)
    rest = count - quotas.sum()
    quotas[np.argsort(-(exact - quotas), kind="stable")[:rest]] += 1
    taken = []
    for row in order:
        if quotas[groups_N[row]]:
            quotas[groups_N[row]] -= 1
            taken.append(row)
    return np.array(taken, dtype=int)


def cluster(rows: Rows, clusters: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """k-means: group of each row [N], and the centres [k, D]; in mini-batches where there are many rows."""
    method: Any = MiniBatchKMeans if rows.shape[0] > _MINI_BATCH_FROM else KMeans
    found = method(n_clusters=min(clusters, rows.shape[0]), n_init=1, random_state=seed).fit(rows)
    return found.labels_.astype(int), found.cluster_centers_


def medoids(rows: Rows, clusters: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `clusters` of the rows that stand for all of them (RoVRM section 4.5).

    Returns:
        Numbers of the rows nearest to the centres of k-means, ascending, and the share of rows that each stands for.
    """
    groups, centres = cluster(rows, clusters, seed=seed)
    chosen, shares = [], []
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        block = rows[members]
        block = block.toarray() if hasattr(block, "toarray") else np.asarray(block)
        distance = ((block.astype(np.float64) - centres[group]) ** 2).sum(axis=1)
        chosen.append(int(members[distance.argmin()]))
        shares.append(len(members) / len(groups))
    order = np.argsort(chosen)
    return np.array(chosen)[order], np.array(shares)[order]
