"""Losses of GRAM's stage 2: label smoothing on the two preference labels.

Equations 3 and 4 of arXiv 2506.14175, with Delta = Z_correct - Z_wrong, the margin of the labels:

    L = -(1 - eps) log pi(correct) - eps log pi(wrong)               (3)
      = -log sigmoid(Delta) + eps * Delta                            (4, pi normalised over the two labels)

so smoothing is a Bradley-Terry ranking loss plus a linear penalty on the margin. Its optimum is finite for
eps > 0: see `smoothing_optimum`. All losses compute in float32 or better and are pure functions.

Shapes: B examples, V vocabulary. Stage 1 is next-token cross-entropy, `eagleray.models.backbone.losses`.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Convention = Literal["paper", "torch"]
Reduction = Literal["mean", "sum", "none"]


def wrong_label_mass(smoothing: float, convention: Convention = "paper") -> float:
    """The epsilon of equation 3 (mass on the wrong label) from a setting in either convention.

    `torch` is the convention of `torch.nn.functional.cross_entropy(label_smoothing=...)`, which spreads its
    mass over both labels, the right one included: only half of it lands on the wrong label. The official GRAM
    settings are in that convention.

    >>> wrong_label_mass(0.1), wrong_label_mass(0.1, "torch")
    (0.1, 0.05)
    """
    if convention not in ("paper", "torch"):
        raise ValueError(f"`convention` is {convention!r}; it must be 'paper' or 'torch'.")
    limit = 0.5 if convention == "paper" else 1.0
    if not 0.0 <= smoothing < limit:
        raise ValueError(
            f"`smoothing` is {smoothing}; with convention={convention!r} it must be in [0, {limit}). "
            f"From {limit} on, the wrong label would get as much mass as the right one."
        )
    return smoothing if convention == "paper" else smoothing / 2


class SmoothingOptimum(NamedTuple):
    """Where the smoothed loss is smallest: margin, probability of the right label, and value of the loss."""

    delta: float
    probability: float
    loss: float


def smoothing_optimum(epsilon: float) -> SmoothingOptimum:
    """Minimum of equation 4 for the epsilon of equation 3: log((1-eps)/eps), 1-eps, and the entropy H(eps).

    Losses at different epsilons are comparable only after H(eps) is subtracted.

    >>> tuple(round(value, 6) for value in smoothing_optimum(0.1))
    (2.197225, 0.9, 0.325083)
    """
    epsilon = wrong_label_mass(epsilon)
    if epsilon == 0.0:
        return SmoothingOptimum(math.inf, 1.0, 0.0)
    entropy = -epsilon * math.log(epsilon) - (1 - epsilon) * math.log1p(-epsilon)
    return SmoothingOptimum(math.log((1 - epsilon) / epsilon), 1 - epsilon, entropy)


def preference_loss(
    delta_B: Tensor,
    *,
    smoothing: float = 0.0,
    convention: Convention = "paper",
    reduction: Reduction = "mean",
) -> Tensor:
    """Equation 4, `-log sigmoid(Delta) + eps * Delta`, on margins oriented towards the right label.

    Args:
        delta_B: Logit of the right label minus logit of the wrong one.
        smoothing: Label smoothing; 0 is the plain Bradley-Terry loss.
        convention: Meaning of `smoothing`, see `wrong_label_mass`.
        reduction: A training loop that accumulates takes `sum` and divides by the size of the global batch.

    >>> round(preference_loss(torch.tensor([1.0], dtype=torch.float64), smoothing=0.1).item(), 6)
    0.413262
    """
    epsilon = wrong_label_mass(smoothing, convention)
    delta_B = _at_least_float32(delta_B)
    # softplus(-Delta), written as logsigmoid: torch's softplus switches to a straight line at 20.
    return _reduce(-F.logsigmoid(delta_B) + epsilon * delta_B, reduction)


def pair_logit_loss(
    logits_B2: Tensor,
    labels_B: Tensor,
    *,
    smoothing: float = 0.0,
    convention: Convention = "paper",
    reduction: Reduction = "mean",
) -> Tensor:
    """Equation 4 on the logits of the labels (A, B), normalised over these two only (`label_space: two_way`).

    Args:
        logits_B2: Logits Z_a, Z_b at the last prompt position.
        labels_B: 0 where the answer shown first is preferred, 1 where the second is.
        smoothing: Label smoothing.
        convention: Meaning of `smoothing`, see `wrong_label_mass`.
        reduction: `mean`, `sum` or `none` over the examples.
    """
    logits_B2 = _at_least_float32(logits_B2)
    sign_B = 1 - 2 * labels_B.to(logits_B2.dtype)
    delta_B = sign_B * (logits_B2[:, 0] - logits_B2[:, 1])
    return preference_loss(delta_B, smoothing=smoothing, convention=convention, reduction=reduction)


def full_vocab_loss(
    logits_BV: Tensor,
    labels_B: Tensor,
    label_ids: tuple[int, int],
    *,
    smoothing: float = 0.0,
    convention: Convention = "paper",
    reduction: Reduction = "mean",
) -> Tensor:
    """Equation 3 with pi normalised over the whole vocabulary (`label_space: full_vocab`).

    It exceeds the two-way loss by -log(pi(A) + pi(B)), which pulls mass onto the two labels: for a model that
    must also generate the letter.

    Args:
        logits_BV: Logits at the last prompt position.
        labels_B: 0 where the answer shown first is preferred, 1 where the second is.
        label_ids: Token ids of the labels A and B.
        smoothing: Label smoothing.
        convention: Meaning of `smoothing`, see `wrong_label_mass`.
        reduction: `mean`, `sum` or `none` over the examples.
    """
    epsilon = wrong_label_mass(smoothing, convention)
    logits_BV = _at_least_float32(logits_BV)
    label_logits_B2 = logits_BV[:, list(label_ids)]
    right_B = label_logits_B2.gather(1, labels_B[:, None])[:, 0]
    wrong_B = label_logits_B2.gather(1, 1 - labels_B[:, None])[:, 0]
    return _reduce(logits_BV.logsumexp(-1) - (1 - epsilon) * right_B - epsilon * wrong_B, reduction)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _reduce(loss_B: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "mean":
        return loss_B.mean()
    if reduction == "sum":
        return loss_B.sum()
    if reduction == "none":
        return loss_B
    raise ValueError(f"`reduction` is {reduction!r}; it must be 'mean', 'sum' or 'none'.")
