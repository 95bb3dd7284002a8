"""How good representations and predicted margins are (spec 6 and 9).

Shapes: N pairs, D width, 2 orders.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import silhouette_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from eagleray.models.gram.metrics import expected_calibration_error, percentile_interval

MARGIN_METRICS = ("mse", "mae", "pearson", "spearman", "auc")
_SILHOUETTE_ROWS = 2000


def order_metrics(u_N2: np.ndarray) -> dict[str, float]:
    """Figures of the logits u(w, l) and u(l, w): right is > 0 in the first order and < 0 in the second.

    `accuracy` is the mean over the orders; `consistency` the share of pairs with sign u(w, l) = −sign u(l, w).
    """
    signed_N2 = u_N2 * [1.0, -1.0]
    return {
        "accuracy": float((signed_N2 > 0).mean()),
        "accuracy_chosen_first": float((signed_N2[:, 0] > 0).mean()),
        "accuracy_chosen_second": float((signed_N2[:, 1] > 0).mean()),
        "consistency": float((np.sign(u_N2[:, 0]) == -np.sign(u_N2[:, 1])).mean()),
        "nll": float(np.logaddexp(0, -signed_N2).mean()),
        "ece": expected_calibration_error(1 / (1 + np.exp(-signed_N2.clip(-50, 50).ravel()))),
    }


def linear_probe(
    h_ND: np.ndarray, labels: Sequence[str], *, folds: int = 5, seed: int = 0
) -> dict[str, float]:
    """Cross-validated accuracy of a logistic regression that tells a label from h, with the majority's share.

    Labels with fewer than `folds` pairs are left out; empty if fewer than two labels are left.
    """
    counts = {label: labels.count(label) for label in set(labels)}
    kept = np.array([counts[label] >= folds for label in labels])
    y_N = np.array(labels)[kept]
    if len(set(y_N)) < 2:
        return {}
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
    found_N = cross_val_predict(model, h_ND[kept], y_N, cv=splits)
    _, sizes = np.unique(y_N, return_counts=True)
    return {"accuracy": float(np.mean(found_N == y_N)), "majority": float(sizes.max() / len(y_N))}


def silhouette(v_ND: np.ndarray, labels: Sequence[str], *, seed: int = 0) -> float | None:
    """Mean silhouette by label over cosine distance, on at most 2,000 pairs; None if there is one label only."""
    if not 1 < len(set(labels)) < len(labels):
        return None
    size = min(len(labels), _SILHOUETTE_ROWS)
    return float(
        silhouette_score(v_ND, np.array(labels), metric="cosine", sample_size=size, random_state=seed)
    )


def margin_metrics(predicted_N: np.ndarray, label_N: np.ndarray) -> dict[str, float]:
    """MSE, MAE, Pearson, Spearman, and AUC for "larger than the median label".

    Correlations with a constant are 0 and its AUC is 1/2: it says nothing.
    """
    return {
        "mse": float(np.square(predicted_N - label_N).mean()),
        "mae": float(np.abs(predicted_N - label_N).mean()),
        "pearson": _pearson(predicted_N, label_N),
        "spearman": _pearson(rankdata(predicted_N), rankdata(label_N)),
        "auc": _auc(predicted_N, label_N > np.median(label_N)),
    }


def margin_report(
    predicted_N: np.ndarray,
    label_N: np.ndarray,
    *,
    clusters: Sequence[Hashable],
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """`margin_metrics`, each with its 95 % bootstrap interval; pairs of one cluster (prompt) are drawn together."""
    members: dict[Hashable, list[int]] = {}
    for row, label in enumerate(clusters):
        members.setdefault(label, []).append(row)
    groups = [np.array(rows) for rows in members.values()]
    rng = np.random.default_rng(seed)
    replicates: list[dict[str, float]] = []
    for _ in range(samples):
        rows = np.concatenate([groups[g] for g in rng.integers(len(groups), size=len(groups))])
        replicates.append(margin_metrics(predicted_N[rows], label_N[rows]))
    values = margin_metrics(predicted_N, label_N)
    return {
        name: asdict(percentile_interval(values[name], np.array([r[name] for r in replicates])))
        for name in MARGIN_METRICS
    }


def _pearson(x_N: np.ndarray, y_N: np.ndarray) -> float:
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
    norm = float(np.linalg.norm(x_N) * np.linalg.norm(y_N))
    return float(x_N @ y_N) / norm if norm > 1e-12 else 0.0


def _auc(score_N: np.ndarray, positive_N: np.ndarray) -> float:
    """Share of (positive, negative) pairs in the right order, ties counting half; 1/2 if a class is missing."""
    positives, negatives = int(positive_N.sum()), int((~positive_N).sum())
    if not positives or not negatives:
        return 0.5
    ranks = float(rankdata(score_N)[positive_N].sum())
    return (ranks - positives * (positives + 1) / 2) / (positives * negatives)
