"""The ranking loss of the reward model.

Shapes: B prompts, K answers of the prompt that has most, best answer first.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def plackett_luce_loss(
    rewards_BK: Tensor, mask_BK: Tensor | None = None, *, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """Negative log-likelihood of the ranking, summed over its places: Σ_i (logsumexp_{j ≥ i} r_j − r_i).

    Spec section 3. For two answers it is the Bradley-Terry loss softplus(r_2 − r_1); one answer costs nothing.
    Computed in float32 or better, and in the log domain, so that no reward is too large.

    Args:
        rewards_BK: Rewards, the best answer first.
        mask_BK: True where there is an answer; prompts with fewer answers are filled at the end. Default: all.
        reduction: Over prompts; a training loop that accumulates takes `sum`.

    >>> round(plackett_luce_loss(torch.tensor([[2.0, 1.0, 0.5]])).item(), 6)
    0.938446
    """
    rewards_BK = rewards_BK.to(torch.promote_types(rewards_BK.dtype, torch.float32))
    if mask_BK is None:
        mask_BK = torch.ones_like(rewards_BK, dtype=torch.bool)
    rewards_BK = rewards_BK.masked_fill(~mask_BK, 0.0)
    places = rewards_BK.shape[1]
    not_before_KK = torch.ones(places, places, dtype=torch.bool, device=rewards_BK.device).triu()
    # An empty place counts itself only: its term is zero, where an empty logsumexp would give NaN gradients.
    itself_KK = torch.eye(places, dtype=torch.bool, device=rewards_BK.device)
    counts_BKK = (not_before_KK & mask_BK[:, None, :]) | itself_KK
    rest_BKK = rewards_BK[:, None, :].masked_fill(~counts_BKK, float("-inf"))
    loss_B = (rest_BKK.logsumexp(-1) - rewards_BK).sum(-1)
    return loss_B.mean() if reduction == "mean" else loss_B.sum()
