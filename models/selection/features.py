"""Features of preference pairs: words, hidden states, gradients of a head (RoVRM section 4.3); and random scores.

Shape letters: B rows, D width of a hidden state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from eagleray.models.selection.rows import SelectionError, unit


def tfidf(texts: Sequence[Sequence[str]], *, max_terms: int = 20_000) -> list[sparse.csr_matrix]:
    """TF-IDF rows of unit length for several sets of texts, over the words of all of them.

    Args:
        texts: Sets of texts.
        max_terms: The most frequent words and pairs of words that count.

    Raises:
        SelectionError: No text holds a word.
    """
    vectorizer = TfidfVectorizer(
        max_features=max_terms, ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"
    )
    try:
        vectorizer.fit([text for part in texts for text in part])
    except ValueError as error:
        raise SelectionError(f"TF-IDF needs texts with words in them: {error}.") from None
    return [sparse.csr_matrix(vectorizer.transform(part)) for part in texts]


def random_scores(ids: Sequence[str], *, seed: int) -> np.ndarray:
    """A number in [0, 1) for each row that depends on its id and the seed alone [N]."""
    digests = (hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in ids)
    return np.array([int.from_bytes(digest[:6], "big") / 2**48 for digest in digests])


def hidden_features(chosen_BD: torch.Tensor, rejected_BD: torch.Tensor | None = None) -> torch.Tensor:
    """Unit rows from the last-token states of the chosen answer, or of both answers side by side ([B, D] or [B, 2D])."""
    both = chosen_BD if rejected_BD is None else torch.cat([chosen_BD, rejected_BD], dim=1)
    return unit(both.float())


def head_gradients(
    chosen_BD: torch.Tensor,
    rejected_BD: torch.Tensor,
    margins_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of each pair's loss softplus(-(r_w - r_l)) with respect to a bias-free linear head.

    d L / d w = -sigma(-(r_w - r_l)) · (e_w - e_l), with e the states that the head reads.

    Args:
        chosen_BD: e_w.
        rejected_BD: e_l.
        margins_B: r_w - r_l; without them rows have unit length, where the factor, being positive, drops out.

    Returns:
        Gradients [B, D] in float32, or their directions (e_l - e_w) / |e_l - e_w|.
    """
    difference = rejected_BD.float() - chosen_BD.float()
    return unit(difference) if margins_B is None else torch.sigmoid(-margins_B.float())[:, None] * difference
