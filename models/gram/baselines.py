"""Baselines without a language model: the longer answer, and a bag of words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from eagleray.models.gram.judge import Comparison, Pair, read_out

REGULARISATION = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Values of C (inverse strength) among which `BagOfWords.fit` chooses."""


class LongerAnswer:
    """Prefers the answer with more characters; its certainty grows with the share of the difference."""

    def compare(self, pairs: Sequence[Pair]) -> list[Comparison]:
        """Judge (prompt, first answer, second answer) triples."""
        deltas = [float(np.log((1 + len(first)) / (1 + len(second)))) for _, first, second in pairs]
        return [read_out(delta, -delta) for delta in deltas]


class BagOfWords:
    """Logistic regression on the difference of tf-idf vectors of the two answers.

    Without an intercept it is antisymmetric: swapping the answers swaps the verdict, so it has no favourite slot.
    It never sees the prompt; what it reaches is what single words and word pairs of the answers give away.
    """

    def __init__(self) -> None:
        self.vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
        self.model: LogisticRegression | None = None

    def fit(self, train: Sequence[Pair], dev: Sequence[Pair]) -> BagOfWords:
        """Fit on pairs with the better answer first; C is the one with the best likelihood on `dev`.

        Likelihood, not accuracy: on a few hundred pairs accuracy jumps by whole percents for no reason.
        """
        self.vectorizer.fit([answer for _, *answers in train for answer in answers])
        difference = self._differences(train)
        # Each pair in both directions: the classes are balanced and the weights antisymmetric.
        features = sparse.vstack([difference, -difference])
        labels = np.repeat([1, 0], len(train))
        dev_features = self._differences(dev)
        fitted = [
            LogisticRegression(C=c, fit_intercept=False, max_iter=1000).fit(features, labels)
            for c in REGULARISATION
        ]
        self.model = min(
            fitted, key=lambda model: float(np.logaddexp(0, -model.decision_function(dev_features)).mean())
        )
        return self

    def compare(self, pairs: Sequence[Pair]) -> list[Comparison]:
        """Judge (prompt, first answer, second answer) triples.

        Raises:
            ValueError: `fit` has not been called.
        """
        if self.model is None:
            raise ValueError("The bag of words has not been fitted; call `fit` first.")
        deltas = self.model.decision_function(self._differences(pairs)).tolist()
        return [read_out(delta, -delta) for delta in deltas]

    def _differences(self, pairs: Sequence[Pair]) -> sparse.csr_matrix:
        first = self.vectorizer.transform([first for _, first, _ in pairs])
        return first - self.vectorizer.transform([second for _, _, second in pairs])
