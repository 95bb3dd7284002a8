"""How alike the attention of two layers is: Jensen-Shannon divergence between their rows (section 3 of the paper).

    JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2,   natural logarithm, between 0 and ln 2

averaged over texts and query rows with at least two visible keys. All pairs of heads are measured, so that one
pass gives four readings: same heads, head-averaged weights, the best source for each head, and the best one-to-one
assignment of heads. A gap between the first and the last two is the evidence for aligning heads. As a first key
that draws most attention makes all layers look alike, the measure can leave it out.

Texts are processed one after the other and rows in blocks; what is kept are sums over pairs of heads.

Shapes: L layers, H heads, R rows in a block, T keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from eagleray.models.lisa.kernels import full_scores
from eagleray.models.lisa.teacher import LayerView, observing

Reduction = Literal["same_head", "head_average", "best_match", "one_to_one"]

_BLOCK = 2**22
"""Numbers of one mixture [H, H, R, T]."""


@dataclass(frozen=True)
class Similarity:
    """Mean divergences of layers of one model."""

    heads: np.ndarray
    """[L, L, H, H]: between head h of layer l and head h' of layer l'; nan where it was not measured."""
    averaged: np.ndarray
    """[L, L]: between the weights averaged over heads."""
    rows: int
    """Query rows that were averaged over."""

    def reduce(self, how: Reduction) -> np.ndarray:
        """[L, L], source layer by target layer; `best_match` lets several heads have the same source."""
        if how == "head_average":
            return self.averaged
        if how == "same_head":
            return np.diagonal(self.heads, axis1=2, axis2=3).mean(-1)
        if how == "best_match":
            return self.heads.min(2).mean(-1)
        if how == "one_to_one":
            return np.array(
                [[self._assigned(i, j) for j in range(len(self.heads))] for i in range(len(self.heads))]
            )
        raise ValueError(f"`how` is {how!r}; it must be same_head, head_average, best_match or one_to_one.")

    def permutation(self, source: int, target: int) -> np.ndarray:
        """For each head of `target` the head of `source` that the best one-to-one assignment gives it.

        Raises:
            ValueError: The pair was not measured.
        """
        cost = self.heads[source, target]
        if np.isnan(cost).any():
            raise ValueError(
                f"Layers {source} and {target} were not compared; measure with `adjacent_only=False`, or "
                "neighbours only."
            )
        sources, targets = linear_sum_assignment(cost)
        return sources[np.argsort(targets)]

    def _assigned(self, source: int, target: int) -> float:
        cost = self.heads[source, target]
        return float("nan") if np.isnan(cost).any() else float(cost[linear_sum_assignment(cost)].mean())


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence over the last axis.

    >>> js_divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).item()  # ln 2
    0.6931471824645996
    """
    return _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2


@torch.no_grad()
def layer_similarity(
    model: Any, texts: Iterable[Tensor], *, adjacent_only: bool = False, drop_first_key: bool = False
) -> Similarity:
    """Measure a model on token ids.

    Args:
        model: An unconverted model.
        texts: Token ids [T] of one text each, without padding.
        adjacent_only: Compare each layer with its predecessor only.
        drop_first_key: Leave out key 0 and renormalise.
    """
    length, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    total = torch.zeros(length, length, heads, heads, dtype=torch.float64)
    averaged = torch.zeros(length, length, dtype=torch.float64)
    compared = [(i, j) for j in range(length) for i in range(j) if j - i == 1 or not adjacent_only]
    rows = 0
    for ids in texts:
        views: list[LayerView] = []

        def keep(view: LayerView, views: list[LayerView] = views) -> None:
            # Queries and keys are small; scores are made again for each block of rows.
            empty = view.scores[..., :0]
            views.append(
                LayerView(view.index, view.attention, view.x, view.q, view.k, empty, None, view.step)
            )

        with observing(model, keep, layers=dict.fromkeys(range(length))):
            model(input_ids=ids[None], use_cache=False)
        first = 2 if drop_first_key else 1
        block = max(1, _BLOCK // (heads * heads * len(ids)))
        for start in range(first, len(ids), block):
            weights = [_weights(v, slice(start, min(start + block, len(ids))), drop_first_key) for v in views]
            entropies = [_entropy(w).sum(-1).double() for w in weights]  # [H]
            for i, j in compared:
                mixed_HH = _entropy((weights[i][:, None] + weights[j][None]) / 2).sum(-1).double()
                total[i, j] += (mixed_HH - (entropies[i][:, None] + entropies[j][None]) / 2).cpu()
                averaged[i, j] += js_divergence(weights[i].mean(0), weights[j].mean(0)).sum().double().cpu()
        rows += max(0, len(ids) - first)
    if not rows:
        raise ValueError("No text has a row to compare; give texts of at least three tokens.")
    return Similarity(
        _both_ways(total / rows, adjacent_only), _both_ways(averaged / rows, adjacent_only), rows
    )


def _weights(view: LayerView, rows: slice, drop_first_key: bool) -> Tensor:
    """Attention weights [H, R, T] of some rows of the only sequence."""
    scores = full_scores(view.q[:, :, rows], view.k, view.attention.scaling)[0].float()
    mask = view.mask[0, :, rows].clone()
    if drop_first_key:
        mask[..., 0] = False
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


def _both_ways(upper: Tensor, adjacent_only: bool) -> np.ndarray:
    """Fill in the transposed pairs, a layer with itself excluded; what was not measured is nan."""
    full = upper + upper.transpose(0, 1).transpose(-1, -2) if upper.ndim == 4 else upper + upper.T
    index = torch.arange(len(full))
    distance = (index[:, None] - index[None]).abs()
    unknown = (distance == 0) | ((distance > 1) & adjacent_only)
    full[unknown] = torch.nan
    return full.numpy()
