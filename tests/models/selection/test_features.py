"""Features: check 15 of the RoVRM specification (projection, head gradients), TF-IDF, and check 23 (planted domain)."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from eagleray.models.selection.choice import best_first
from eagleray.models.selection.cosine import cosine_scores
from eagleray.models.selection.costs import FeatureCost
from eagleray.models.selection.features import (
    head_gradients,
    hidden_features,
    random_scores,
    tfidf,
)
from eagleray.models.selection.projection import RandomProjection
from eagleray.models.selection.rows import SelectionError
from eagleray.models.selection.synthetic import planted_pairs
from eagleray.models.selection.transport import TransportSettings, transport


def test_check_15_projection_is_linear_and_keeps_inner_products() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 3, 2500, generator=generator)
    project = RandomProjection(4096, block=512)
    torch.testing.assert_close(project(2 * u - 3 * v), 2 * project(u) - 3 * project(v), atol=1e-4, rtol=1e-4)
    inner, kept = (u * v).sum(1), (project(u) * project(v)).sum(1)
    assert ((inner - kept).abs() < 5 * u.norm(dim=1) * v.norm(dim=1) / 4096**0.5).all()
    assert not torch.equal(RandomProjection(64, seed=1)(u), RandomProjection(64, seed=2)(u))
    torch.testing.assert_close(project(u)[1:2], project(u[1:2]), atol=1e-4, rtol=1e-4)


def test_check_15_signs_are_those_of_the_written_out_matrix() -> None:
    rows = torch.randn(2, 20, generator=torch.Generator().manual_seed(1))
    project = RandomProjection(16, seed=3, block=8)
    whole = torch.cat([project.signs(i) for i in range(3)])[:20]
    assert set(whole.unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(project(rows), rows @ whole / 4)


def test_check_15_two_processes_agree_bitwise() -> None:
    code = (
        "import hashlib, torch; from eagleray.models.selection.projection import RandomProjection; "
        "x = torch.arange(3000.0).reshape(2, 1500) / 7; "
        "print(hashlib.sha256(RandomProjection(256, seed=5)(x).numpy().tobytes()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    mine = RandomProjection(256, seed=5)(torch.arange(3000.0).reshape(2, 1500) / 7)
    assert other.strip() == hashlib.sha256(mine.numpy().tobytes()).hexdigest()


def test_a_projection_has_a_width_of_whole_bytes() -> None:
    with pytest.raises(SelectionError, match="multiple of 8"):
        RandomProjection(12)


def test_check_15_head_gradients_are_those_of_autograd() -> None:
    chosen, rejected = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(2))
    head = torch.randn(7, generator=torch.Generator().manual_seed(3))
    margins = (chosen - rejected) @ head
    expected = []
    for e_w, e_l in zip(chosen, rejected, strict=True):
        w = head.clone().requires_grad_(True)
        torch.nn.functional.softplus(-((e_w @ w) - (e_l @ w))).backward()
        assert w.grad is not None
        expected.append(w.grad)
    torch.testing.assert_close(
        head_gradients(chosen, rejected, margins), torch.stack(expected), atol=1e-5, rtol=1e-5
    )
    unit = head_gradients(chosen, rejected)
    difference = rejected - chosen
    torch.testing.assert_close(unit, difference / difference.norm(dim=1, keepdim=True))
    whole = head_gradients(chosen, rejected, margins)
    torch.testing.assert_close(unit, whole / whole.norm(dim=1, keepdim=True))
    torch.testing.assert_close(head_gradients(rejected, chosen), -unit)


def test_hidden_features_are_unit_rows() -> None:
    chosen, rejected = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 12.0]])
    torch.testing.assert_close(hidden_features(chosen), torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(hidden_features(chosen, rejected), torch.tensor([[3.0, 4, 0, 12]]) / 13)


def test_tfidf_spans_all_sets_and_wants_words() -> None:
    pool, target = parts = tfidf([["the red cup", "a tall tree", "red cup here"], ["red cup"]])
    assert len({part.toarray().shape[1] for part in parts}) == 1
    scores = cosine_scores(pool, target)
    assert scores.argmin() == 1 and scores[1] == 0
    with pytest.raises(SelectionError, match="texts with words"):
        tfidf([["?!"], ["..."]])


def test_random_scores_follow_the_id_alone() -> None:
    ids = [f"r{i}" for i in range(200)]
    scores = random_scores(ids, seed=1)
    assert np.array_equal(random_scores(ids[::-1], seed=1), scores[::-1])
    assert not np.array_equal(random_scores(ids, seed=2), scores)
    assert 0 <= scores.min() < 0.1 and 0.9 < scores.max() < 1


@pytest.mark.parametrize("mode", ["plan_cost", "pointwise", "dual"])
def test_check_23_planted_domain_in_vectors(mode: str) -> None:
    """400 rows, half of them around the directions of 32 targets: the top half holds at least 90 % of that half."""
    rng = np.random.default_rng(0)
    near, far = rng.normal(size=(2, 4, 32))
    draw = lambda centres, count: centres[rng.integers(0, 4, count)] + rng.normal(size=(count, 32))
    pool = np.concatenate([draw(near, 200), draw(far, 200)])
    settings = TransportSettings(mode=mode)  # type: ignore[arg-type]
    scores = transport(FeatureCost(pool, draw(near, 32)), settings=settings).score_N
    order = best_first(scores, [f"{i:03d}" for i in range(400)], highest=False)
    assert (order[:200] < 200).mean() >= 0.9


def test_check_23_planted_domain_in_texts() -> None:
    """The same on generated pairs, of which half ask about a picture, by their words; random order finds about half."""
    pool = planted_pairs(400, seed=0)
    target = planted_pairs(32, seed=1, kinds=("picture",))
    rows, goal = tfidf([[pair["prompt"] for pair in part] for part in (pool, target)])
    planted = np.array([pair["source"] == "picture" for pair in pool])
    assert planted.sum() == 200
    ids = [pair["id"] for pair in pool]
    scores = transport(FeatureCost(rows, goal)).score_N
    assert planted[best_first(scores, ids, highest=False)[:200]].mean() >= 0.9
    assert planted[best_first(cosine_scores(rows, goal), ids, highest=True)[:200]].mean() >= 0.9
    assert 0.35 < planted[best_first(random_scores(ids, seed=0), ids, highest=True)[:200]].mean() < 0.65
