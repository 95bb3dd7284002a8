"""Selection by cosine: checks 7 to 11 and 18 of the LRHP specification; choosing from scores, and bad input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from eagleray.models.selection.choice import best_first, cluster, how_many, medoids, take_by_quota
from eagleray.models.selection.cosine import cosine_scores, nearest_targets
from eagleray.models.selection.rows import (
    SelectionError,
    check_disjoint,
    check_rows,
    check_same_width,
    mean_row,
)

TARGETS = np.array([[1.0, 0, 0], [0.8, 0.6, 0]])
POOL = np.array([[0.9, 0.1, 0.2], [0, 1, 0], [0.6, 0.8, 0], [-1, 0, 0.1], [0.7, 0.3, 0.6]])
IDS = list("ABCDE")
EXPECTED = {
    "mean": [0.905795, 0.300000, 0.780000, -0.895533, 0.742623],
    "max": [0.970495, 0.6, 0.96, -0.796030, 0.763252],
    "centroid": [0.954792, 0.316228, 0.822192, -0.943975, 0.782794],
}


def chosen(scores: np.ndarray, ids: list[str], count: int) -> set[str]:
    return {ids[i] for i in best_first(scores, ids, highest=True)[:count]}


@pytest.mark.parametrize("aggregate", ["mean", "max", "centroid"])
def test_lrhp_check_7_scores(aggregate: Any) -> None:
    scores = cosine_scores(POOL, TARGETS, aggregate=aggregate)
    np.testing.assert_allclose(scores, EXPECTED[aggregate], atol=1e-6)
    assert chosen(scores, IDS, 3) == {"A", "C", "E"}


def test_lrhp_check_8_mean_is_the_centroid_times_its_length() -> None:
    length = np.linalg.norm(TARGETS.mean(0))
    assert length == pytest.approx(0.948683, abs=1e-6)
    mean, centroid = (cosine_scores(POOL, TARGETS, aggregate=how) for how in ("mean", "centroid"))
    np.testing.assert_allclose(mean, length * centroid, atol=1e-12)


def test_lrhp_check_9_mean_and_max_differ() -> None:
    radians = np.deg2rad([10, 45])
    pool = np.stack([np.cos(radians), np.sin(radians)], axis=1)
    mean, most = (cosine_scores(pool, np.eye(2), aggregate=how) for how in ("mean", "max"))
    np.testing.assert_allclose(mean, [0.579228, 0.707107], atol=1e-6)
    np.testing.assert_allclose(most, [0.984808, 0.707107], atol=1e-6)
    assert (chosen(mean, ["P", "Q"], 1), chosen(most, ["P", "Q"], 1)) == ({"Q"}, {"P"})


@pytest.mark.parametrize("aggregate", ["mean", "max", "topk_mean", "centroid"])
def test_lrhp_check_10_invariances(aggregate: Any) -> None:
    rng = np.random.default_rng(0)
    pool, target = rng.normal(size=(40, 6)).astype(np.float32), rng.normal(size=(9, 6)).astype(np.float32)
    ids = [f"r{i:02d}" for i in range(40)]
    score = lambda x, y: cosine_scores(x, y, aggregate=aggregate, top=4)
    base = score(pool, target)
    order = rng.permutation(40)
    moved = score(pool[order], target)
    np.testing.assert_allclose(moved, base[order], atol=1e-14)
    assert chosen(moved, [ids[i] for i in order], 12) == chosen(base, ids, 12)
    np.testing.assert_allclose(score(pool, target[::-1].copy()), base, atol=1e-12)
    if aggregate != "topk_mean":  # whose largest four are two doubled
        np.testing.assert_allclose(score(pool, np.vstack([target] * 3)), base, atol=1e-12)
    factors = rng.uniform(0.1, 9, size=(40, 1)).astype(np.float32)
    assert chosen(score(pool * factors, 3 * target), ids, 12) == chosen(base, ids, 12)
    assert (chosen(base, ids, 40), chosen(base, ids, 0)) == (set(ids), set())
    for parts in (2, 7):
        split = np.concatenate([score(part, target) for part in np.array_split(pool, parts)])
        assert chosen(split, ids, 12) == chosen(base, ids, 12)


def test_lrhp_check_11_copies_tie_and_ties_go_by_id() -> None:
    rng = np.random.default_rng(1)
    pool = rng.normal(size=(3000, 65)).astype(np.float32)
    pool[2999] = pool[7]
    for aggregate in ("mean", "max", "topk_mean", "centroid"):
        scores = cosine_scores(pool, rng.normal(size=(5, 65)).astype(np.float32), aggregate=aggregate)
        assert scores[7] == pytest.approx(scores[2999], abs=1e-14)
        order = best_first(scores, [str(9999 - i) for i in range(3000)], highest=True).tolist()
        assert order.index(2999) == order.index(7) - 1


def test_lrhp_check_18_prompts_of_the_targets_test_set_are_refused() -> None:
    with pytest.raises(
        SelectionError, match=r"2 row\(s\).*the target's test set has too: p2 \(= t9\), p4 \(= t9\)"
    ):
        check_disjoint(
            ["Why?", "How do I  descale a kettle", "Where?", "how do I descale a kettle?"],
            ["p1", "p2", "p3", "p4"],
            ["When?", "How do I descale a kettle?"],
            ["t8", "t9"],
            what="target's test set",
        )
    check_disjoint(["Why?"], ["p1"], ["When?"], ["t1"], what="target")


def test_centring_takes_the_common_direction_away() -> None:
    """A large offset makes all cosines near 1; without it the planted half comes first."""
    rng = np.random.default_rng(2)
    kind = np.repeat([0, 1], 50)
    signs = np.where(kind == 0, 1.0, -1.0)[:, None]
    pool = 30 + signs * np.eye(8)[0] * 2 + rng.normal(size=(100, 8))
    target = 30 + np.eye(8)[0] * 2 + rng.normal(size=(10, 8))
    scores = cosine_scores(pool, target, centre_D=mean_row(pool))
    assert (kind[np.argsort(-scores)[:50]] == 0).mean() >= 0.9
    assert cosine_scores(pool, target).min() > 0.9


def test_sparse_rows_score_as_dense_ones() -> None:
    rng = np.random.default_rng(3)
    pool, target = rng.random((30, 9)) * (rng.random((30, 9)) < 0.3), rng.random((4, 9))
    for aggregate in ("mean", "max"):
        np.testing.assert_allclose(
            cosine_scores(sparse.csr_matrix(pool), sparse.csr_matrix(target), aggregate=aggregate),
            cosine_scores(torch.from_numpy(pool), target, aggregate=aggregate),
            atol=1e-14,
        )


def test_nearest_targets() -> None:
    assert nearest_targets(POOL, TARGETS).tolist() == [0, 1, 1, 1, 1]


def test_targets_that_cancel_out_have_no_centroid() -> None:
    with pytest.raises(SelectionError, match="cancel out"):
        cosine_scores(POOL, np.array([[1.0, 0, 0], [-1, 0, 0]]), aggregate="centroid")


@pytest.mark.parametrize(
    ("rows", "ids", "message"),
    [
        (np.ones((2, 2)), ["a", "a"], "ids that occur more than once: a"),
        (np.ones((2, 2)), ["a"], "2 feature rows and 1 ids"),
        (np.array([[1, math.nan], [1, 1]]), ["a", "b"], "not finite numbers: a"),
        (torch.tensor([[1.0, 1], [math.inf, 1]]), ["a", "b"], "not finite numbers: b"),
        (sparse.csr_matrix([[1, 0], [0, math.nan]]), ["a", "b"], "not finite numbers: b"),
        (np.ones((0, 2)), [], r"shape \(0, 2\)"),
        (np.ones(3), ["a", "b", "c"], r"shape \(3,\)"),
    ],
)
def test_features_that_are_refused(rows: Any, ids: list[str], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        check_rows(rows, ids, "pool")


def test_mixed_dimensions_are_refused() -> None:
    with pytest.raises(SelectionError, match="width 3 and those of the target 2"):
        cosine_scores(POOL, np.eye(2))
    check_same_width(POOL, TARGETS)


def test_how_many_needs_one_of_both() -> None:
    for given in ({}, {"count": 1, "fraction": 0.5}):
        with pytest.raises(SelectionError, match="either `count` or `fraction`"):
            how_many(3, **given)


def test_quotas_follow_the_sizes_of_the_groups() -> None:
    groups = np.array([0] * 6 + [1] * 3 + [2])
    taken = take_by_quota(np.arange(10), groups, 5)
    assert np.bincount(groups[taken]).tolist() == [3, 2]
    assert taken.tolist() == [0, 1, 2, 6, 7]
    assert sorted(take_by_quota(np.arange(10), groups, 10)) == list(range(10))


def test_medoids_stand_for_all_targets() -> None:
    rng = np.random.default_rng(4)
    centres = np.array([[0.0, 0], [9, 9], [-9, 9]])
    rows = np.concatenate([centres[i] + 0.1 * rng.normal(size=(n, 2)) for i, n in enumerate((10, 20, 70))])
    numbers, shares = medoids(rows, 3, seed=0)
    assert sorted(shares) == [0.1, 0.2, 0.7]
    near = np.abs(rows[numbers][:, None] - centres).sum(-1)
    assert sorted(near.argmin(1)) == [0, 1, 2] and near.min(1).max() < 1
    assert len(np.unique(cluster(rows, 500, seed=0)[0])) <= 100
