"""What representations must beat: features of a pair that need no pair encoder (spec 6).

Shapes: N pairs, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from eagleray.models.gram.discriminative import DiscriminativeScorer
from eagleray.models.lrhp.representer import Order
from eagleray.models.lrhp.store import RepresentationStore
from eagleray.platform.data.preferences import Preference
from eagleray.platform.scoring import Row, Score, map_with_model
from eagleray.platform.sections import ModelSection, RaySection

Features = tuple[np.ndarray, np.ndarray]
"""Of the training and of the test pairs."""
_WORDS = 2000


def baseline_features(
    train: Sequence[Preference],
    test: Sequence[Preference],
    *,
    reward_model: str | None,
    stores: Mapping[str, str],
    order: Order | None,
    ray: RaySection,
) -> dict[str, Features]:
    """Features by the name that a baseline has in the report; the regression on them is the caller's."""
    features: dict[str, Features] = {"length difference": (_length_gaps(train), _length_gaps(test))}
    features["tf-idf"] = _tfidf_differences(train, test)
    if reward_model is not None:
        gaps_N1 = _reward_gaps([*train, *test], ModelSection(path=reward_model).path, ray)
        features["reward model"] = gaps_N1[: len(train)], gaps_N1[len(train) :]
    for name, folder in stores.items():
        store = RepresentationStore(Path(folder).expanduser()).read(order)
        rows = (store.rows_of([pair.id for pair in part]) for part in (train, test))
        train_ND, test_ND = (store.h_ND[part] for part in rows)
        features[name] = train_ND, test_ND
    return features


def build_reward_scorer(path: str) -> Score:
    """For the workers: rows with prompt, chosen and rejected to `gap`, the difference of their rewards."""
    scorer = DiscriminativeScorer.from_pretrained(path)

    def score(rows: list[Row]) -> list[Row]:
        rewards = scorer.score(
            [(row["prompt"], row[answer]) for row in rows for answer in ("chosen", "rejected")]
        )
        return [{"gap": rewards[2 * i] - rewards[2 * i + 1]} for i in range(len(rows))]

    return score


def _length_gaps(pairs: Sequence[Preference]) -> np.ndarray:
    """Characters of the chosen answer minus those of the rejected one, [N, 1]."""
    return np.array([[float(len(pair.chosen) - len(pair.rejected))] for pair in pairs])


def _tfidf_differences(train: Sequence[Preference], test: Sequence[Preference]) -> Features:
    """Words of the chosen answer minus those of the rejected one, by tf-idf known from the training answers."""
    vectorizer = TfidfVectorizer(max_features=_WORDS, sublinear_tf=True)
    vectorizer.fit([answer for pair in train for answer in (pair.chosen, pair.rejected)])

    def differences(pairs: Sequence[Preference]) -> Any:
        chosen = vectorizer.transform([pair.chosen for pair in pairs])
        return (chosen - vectorizer.transform([pair.rejected for pair in pairs])).toarray()

    return differences(train), differences(test)


def _reward_gaps(pairs: Sequence[Preference], path: str, ray: RaySection) -> np.ndarray:
    """|r_w − r_l| of a reward model, [N, 1]."""
    rows = [{"prompt": p.prompt_text, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    found = map_with_model(build_reward_scorer, {"path": path}, rows, ray)
    return np.array([[abs(float(row["gap"]))] for row in found])
