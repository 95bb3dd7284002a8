"""Margin labels, ridge (check 12), the MLP, metrics with intervals, and predictors that survive saving."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from eagleray.models.lrhp.margins import (
    MarginPredictor,
    choose_alpha,
    fit_mlp,
    fit_ridge,
    margin_labels,
    ridge,
)
from eagleray.models.lrhp.metrics import (
    linear_probe,
    margin_metrics,
    margin_report,
    order_metrics,
    silhouette,
)

X_ND = np.array([[1.0, 0], [0, 1], [1, 1], [2, 1]])
Y_N = np.array([1.0, 2, 3, 4])


def test_check_12_ridge() -> None:
    w_D, b = ridge(X_ND, Y_N, 0.0)
    np.testing.assert_allclose(w_D, [1, 2], atol=1e-6)
    assert b == pytest.approx(0, abs=1e-6)
    assert np.square(X_ND @ w_D + b - Y_N).mean() == pytest.approx(0, abs=1e-12)
    w_D, b = ridge(X_ND, Y_N, 1.0)
    np.testing.assert_allclose(w_D, [0.666667, 0.857143], atol=1e-6)
    assert b == pytest.approx(1.190476, abs=1e-6)
    predicted_N = X_ND @ w_D + b
    np.testing.assert_allclose(predicted_N, [1.857143, 2.047619, 2.714286, 3.380952], atol=1e-6)
    found = margin_metrics(predicted_N, Y_N)
    assert found["mse"] == pytest.approx(0.300454, abs=1e-6)
    assert found["pearson"] == pytest.approx(0.976092, abs=1e-6)


@pytest.mark.parametrize("shape", [(60, 7), (20, 50)])
def test_ridge_agrees_with_scikit_learn(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x_ND, y_N = rng.normal(size=shape), rng.normal(size=shape[0])
    for alpha in (1e-3, 1.0, 100.0):
        expected = Ridge(alpha=alpha).fit(x_ND, y_N)
        w_D, b = ridge(x_ND, y_N, alpha)
        np.testing.assert_allclose(w_D, expected.coef_, atol=1e-7)
        assert b == pytest.approx(expected.intercept_, abs=1e-7)


def test_ridge_without_penalty_survives_features_that_repeat() -> None:
    w_D, b = ridge(np.hstack([X_ND, X_ND]), Y_N, 0.0)
    np.testing.assert_allclose(np.hstack([X_ND, X_ND]) @ w_D + b, Y_N, atol=1e-9)
    assert np.abs(w_D).max() < 3


def test_cross_validation_shrinks_noise_and_trusts_signal() -> None:
    rng = np.random.default_rng(0)
    x_ND = rng.normal(size=(80, 30))
    assert choose_alpha(x_ND, rng.normal(size=80)) >= 100
    assert choose_alpha(x_ND, x_ND @ rng.normal(size=30)) <= 0.01
    with pytest.raises(ValueError, match="cross-validation needs at least 2"):
        choose_alpha(x_ND[:1], np.ones(1))


def test_labels_drop_what_contradicts_keep_ties_and_refuse_the_impossible() -> None:
    found_N, rows = margin_labels(list("abcd"), np.array([4.5, -1.0, 0.0, 9.0]), max_gap=9)
    assert found_N.tolist() == [0.5, 0.0, 1.0] and rows.tolist() == [0, 2, 3]
    with pytest.raises(
        ValueError, match=r"2 margins are not numbers up to `max_gap` = 4: a \(4.5\), d \(nan\)"
    ):
        margin_labels(list("abcd"), np.array([4.5, -1.0, 0.0, np.nan]), max_gap=4)


def test_check_15_swapping_chosen_and_rejected_negates_the_margin() -> None:
    scores = np.array([[8.5, 2.0], [3.0, 3.0]])
    forward, backward = (s[:, 0] - s[:, 1] for s in (scores, scores[:, ::-1]))
    np.testing.assert_array_equal(forward, -backward)
    assert margin_labels(["a", "b"], backward, max_gap=9)[1].tolist() == [1]


def test_predictors_learn_and_survive_saving(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x_ND = rng.normal(size=(400, 6)).astype(np.float32) * 50 + 7
    y_N = 1 / (1 + np.exp(-(x_ND - 7) @ np.array([1, -1, 0.5, 0, 0, 0]) / 50))
    train, test = slice(0, 300), slice(300, 400)
    fitted = {
        "ridge": fit_ridge(x_ND[train], y_N[train], about={"model_hash": "m"}),
        "mlp": fit_mlp(x_ND[train], y_N[train], epochs=60, about={"model_hash": "m"}),
    }
    for name, predictor in fitted.items():
        predicted_N = predictor.predict(x_ND[test])
        assert margin_metrics(predicted_N, y_N[test])["spearman"] > 0.95, name
        predictor.save(tmp_path / name)
        again = MarginPredictor.load(tmp_path / name)
        np.testing.assert_allclose(again.predict(x_ND[test]), predicted_N, atol=1e-12)
        assert again.about["model_hash"] == "m" and again.kind == name
    same = fit_mlp(x_ND[train], y_N[train], epochs=60).predict(x_ND[test])
    np.testing.assert_array_equal(same, fitted["mlp"].predict(x_ND[test]))
    assert (same >= 0).all()  # softplus
    with pytest.raises(ValueError, match=r"no margin\.json"):
        MarginPredictor.load(tmp_path)


def test_metrics_agree_with_scipy_and_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    label_N = rng.integers(0, 6, size=50) / 5
    predicted_N = np.round(label_N + rng.normal(size=50), 1)  # with ties
    found = margin_metrics(predicted_N, label_N)
    assert found["pearson"] == pytest.approx(pearsonr(predicted_N, label_N)[0])
    assert found["spearman"] == pytest.approx(spearmanr(predicted_N, label_N)[0])
    assert found["auc"] == pytest.approx(roc_auc_score(label_N > np.median(label_N), predicted_N))
    constant = margin_metrics(np.full(50, 0.3), label_N)
    assert (constant["pearson"], constant["spearman"], constant["auc"]) == (0.0, 0.0, 0.5)


def test_intervals_draw_whole_prompts() -> None:
    """Twenty copies of each pair tell no more than the pairs themselves."""
    rng = np.random.default_rng(0)
    label_N = rng.random(30)
    predicted_N = label_N + rng.normal(size=30) / 4
    alone = margin_report(predicted_N, label_N, clusters=range(30), samples=300)
    copied = margin_report(
        np.tile(predicted_N, 20), np.tile(label_N, 20), clusters=list(range(30)) * 20, samples=300
    )
    for figure in alone.values():
        assert figure["low"] <= figure["value"] <= figure["high"]
    width = [r["spearman"]["high"] - r["spearman"]["low"] for r in (alone, copied)]
    assert width[1] == pytest.approx(width[0], rel=0.3)


def test_order_metrics_by_hand() -> None:
    """Right in both orders; right in the first only (the same sign twice); wrong in both."""
    found = order_metrics(np.array([[2.0, -1.0], [1.0, 3.0], [-0.5, 0.5]]))
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["accuracy_chosen_first"] == pytest.approx(2 / 3)
    assert found["accuracy_chosen_second"] == pytest.approx(1 / 3)
    assert found["consistency"] == pytest.approx(2 / 3)


def test_probe_and_silhouette_see_planted_groups_and_nothing_in_noise() -> None:
    rng = np.random.default_rng(0)
    labels = ["a", "b"] * 60 + ["rare"]
    planted_ND = rng.normal(size=(121, 8)) + 4.0 * np.array([label == "a" for label in labels])[:, None]
    found = linear_probe(planted_ND, labels)
    assert found["accuracy"] > 0.95 and found["majority"] == 0.5
    assert linear_probe(rng.normal(size=(121, 8)), labels)["accuracy"] < 0.7
    assert linear_probe(planted_ND, ["a"] * 121) == {}
    apart = np.where(np.array(labels)[:, None] == "a", 1.0, -1.0) + rng.normal(size=(121, 8)) / 9
    assert (silhouette(apart[:120], labels[:120]) or 0) > 0.8
    assert silhouette(planted_ND, ["a"] * 121) is None
