"""Aligning a policy with a reward: reward transforms, PPO token rewards, DPO, and the KL of best-of-n.

Section 6 of the GRAM specification: the sequence reward is r(x, y_sample; y_reference) of equation 5,
in (0, 1) with 0.5 as parity; it is paid at the last token, and every token pays for leaving the reference.

Shapes: B sequences, T response tokens.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from eagleray.models.gram.losses import Reduction, preference_loss

RewardTransform = Literal["prob", "centred", "logit"]


def kl_best_of_n(n: int) -> float:
    """KL divergence of best-of-n sampling from the policy it samples: ln n - (n - 1)/n.

    >>> round(kl_best_of_n(16), 6)
    1.835089
    """
    if n < 1:
        raise ValueError(f"`n` is {n}; best-of-n needs at least one sample.")
    return math.log(n) - (n - 1) / n


def transform_reward(reward_B: Tensor, transform: RewardTransform = "prob", *, clip: float = 5.0) -> Tensor:
    """A preference probability as a scalar reward.

    Args:
        reward_B: Probabilities of equation 5.
        transform: `prob` leaves them (official), `centred` is 2r - 1, `logit` is log(r / (1 - r)).
        clip: Largest absolute value of `logit`, whose range is otherwise unbounded.
    """
    if transform == "prob":
        return reward_B
    if transform == "centred":
        return 2 * reward_B - 1
    if transform == "logit":
        if not clip > 0:
            raise ValueError(f"`clip` is {clip}; it must be positive.")
        return torch.logit(reward_B).clamp(-clip, clip)
    raise ValueError(f"`transform` is {transform!r}; it must be 'prob', 'centred' or 'logit'.")


def ppo_token_rewards(
    policy_logps_BT: Tensor, reference_logps_BT: Tensor, mask_BT: Tensor, reward_B: Tensor, *, beta: float
) -> Tensor:
    """Token rewards R_t = -beta (log pi(y_t) - log pi_ref(y_t)) + 1[t = last] r.

    Args:
        policy_logps_BT: Log-probabilities of the sampled tokens under the policy.
        reference_logps_BT: The same under the reference policy.
        mask_BT: True at response tokens; each row has at least one.
        reward_B: Sequence rewards.
        beta: Weight of the divergence from the reference.

    Returns:
        Rewards [B, T], zero outside the mask.
    """
    if not mask_BT.any(1).all():
        raise ValueError(
            "Every row of `mask_BT` needs at least one response token to carry the sequence reward."
        )
    mask_BT = mask_BT.bool()
    penalty_BT = -beta * (policy_logps_BT - reference_logps_BT)
    positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = (mask_BT * positions_T).argmax(1)
    return penalty_BT.masked_fill(~mask_BT, 0.0).scatter_add(
        1, last_B[:, None], reward_B[:, None].to(penalty_BT.dtype)
    )


def dpo_margin(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    beta: float,
) -> Tensor:
    """Implicit reward difference of DPO, beta [log-ratio of the chosen - log-ratio of the rejected answer].

    All arguments are sequence log-probabilities; the result scores a pair (policy as reward model).
    """
    return beta * ((policy_chosen_B - reference_chosen_B) - (policy_rejected_B - reference_rejected_B))


def dpo_loss(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    *,
    beta: float = 0.1,
    smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """DPO: equation 4 on the implicit reward difference; `smoothing` is the mass on the wrong label.

    >>> values = [torch.tensor([v], dtype=torch.float64) for v in (-10.0, -11.0, -12.0, -11.5)]
    >>> round(dpo_loss(*values, beta=0.1).item(), 6)
    0.620957
    """
    delta_B = dpo_margin(
        policy_chosen_B, policy_rejected_B, reference_chosen_B, reference_rejected_B, beta=beta
    )
    return preference_loss(delta_B, smoothing=smoothing, reduction=reduction)
