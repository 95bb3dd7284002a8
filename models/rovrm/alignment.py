"""What aligning a policy with a visual reward adds to `models.gram.alignment`: scaled rewards and advantages.

RoVRM specification, section 6 (read in the released code) and checks 21 and 22. RLOO and GRPO are common alternatives to
PPO; nothing says that the paper uses them.

Shapes: B sequences, T response tokens, P prompts, K samples of a prompt.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class RewardQueue:
    """Standardises rewards by the mean and the standard deviation of recent ones, then clips them.

    The released code multiplies by 10 before it clips to ±10, so that everything beyond one standard deviation is the
    same; `scale=10` does that.
    """

    def __init__(self, *, size: int = 1000, scale: float = 1.0, clip: float = 10.0) -> None:
        """An empty queue.

        Args:
            size: How many rewards are remembered, the latest ones.
            scale: Factor of a standardised reward.
            clip: Largest absolute value of a result.

        Raises:
            ValueError: One of them is not positive.
        """
        for name, value in (("size", size), ("scale", scale), ("clip", clip)):
            if not value > 0:
                raise ValueError(f"`{name}` is {value}; it must be positive.")
        self.scale, self.clip = scale, clip
        self._recent: deque[float] = deque(maxlen=size)

    def __call__(self, rewards_B: Tensor) -> Tensor:
        """Remember rewards, then scale them [B]; while their spread is not known they are only clipped.

        Raises:
            ValueError: A reward is not finite; it would stay in the queue for long.
        """
        if not bool(torch.isfinite(rewards_B).all()):
            raise ValueError("A reward is NaN or infinite.")
        self._recent.extend(rewards_B.double().tolist())
        known = torch.tensor(list(self._recent), dtype=torch.float64)
        # One value has no spread: its unbiased standard deviation is NaN.
        if len(known) < 2 or not (spread := float(known.std())) > 1e-6:
            return rewards_B.clamp(-self.clip, self.clip)
        return ((rewards_B - float(known.mean())) / spread * self.scale).clamp(-self.clip, self.clip)

    def state_dict(self) -> dict[str, list[float]]:
        """What a checkpoint has to keep."""
        return {"recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Go on from a checkpoint."""
        self._recent.clear()
        self._recent.extend(state["recent"])


def generalised_advantages(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float = 0.99, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """GAE: A_t = δ_t + γ λ A_{t+1} with δ_t = r_t + γ V_{t+1} − V_t, and returns A + V.

    Args:
        rewards_BT: Token rewards, e.g. of `ppo_token_rewards`.
        values_BT: V of the state before each token; behind the last one V is 0.
        mask_BT: True at response tokens, which begin at the left and have no gaps.
        gamma: Discount γ.
        lam: λ.

    Returns:
        Advantages and returns [B, T], zero outside the mask.

    >>> r, v = torch.tensor([[0.0, -0.1, 2.0]]), torch.tensor([[0.5, 0.6, 0.7]])
    >>> [round(a, 6) for a in generalised_advantages(r, v, torch.ones(1, 3))[0][0].tolist()]
    [1.237319, 1.21565, 1.3]
    """
    if rewards_BT.shape != values_BT.shape or rewards_BT.shape != mask_BT.shape:
        raise ValueError(
            f"Rewards {tuple(rewards_BT.shape)}, values {tuple(values_BT.shape)} and mask {tuple(mask_BT.shape)} must "
            "have one shape."
        )
    mask_BT = mask_BT.bool()
    rewards_BT = rewards_BT.masked_fill(~mask_BT, 0.0)
    values_BT = values_BT.masked_fill(~mask_BT, 0.0)
    following_BT = torch.cat([values_BT[:, 1:], values_BT.new_zeros(len(values_BT), 1)], dim=1)
    deltas_BT = rewards_BT + gamma * following_BT - values_BT
    advantages_BT = torch.zeros_like(deltas_BT)
    carried_B = deltas_BT.new_zeros(len(deltas_BT))
    for t in reversed(range(deltas_BT.shape[1])):
        carried_B = deltas_BT[:, t] + gamma * lam * carried_B
        advantages_BT[:, t] = carried_B
    advantages_BT = advantages_BT.masked_fill(~mask_BT, 0.0)
    return advantages_BT, (advantages_BT + values_BT).masked_fill(~mask_BT, 0.0)


def clipped_policy_loss(
    logps_BT: Tensor, old_logps_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, *, clip: float = 0.2
) -> Tensor:
    """PPO: mean over tokens of −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) with ρ = π / π_old."""
    ratio_BT = (logps_BT - old_logps_BT).exp()
    loss_BT = -torch.minimum(ratio_BT * advantages_BT, ratio_BT.clamp(1 - clip, 1 + clip) * advantages_BT)
    return _token_mean(loss_BT, mask_BT)


def clipped_value_loss(
    values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, *, clip: float = 0.2
) -> Tensor:
    """PPO: half the mean over tokens of the larger squared error, of V or of V kept within ε of its old value."""
    near_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
    larger_BT = torch.maximum((values_BT - returns_BT).square(), (near_BT - returns_BT).square())
    return 0.5 * _token_mean(larger_BT, mask_BT)


def kl_size(
    policy_logps_BT: Tensor, reference_logps_BT: Tensor, mask_BT: Tensor, *, beta: float = 0.1
) -> Tensor:
    """What a log shows of the divergence: mean over tokens of β |log π − log π_ref|, without any reward in it."""
    return beta * _token_mean((policy_logps_BT - reference_logps_BT).abs(), mask_BT)


def rloo_advantages(rewards_PK: Tensor) -> Tensor:
    """A_i = r_i − the mean reward of the other samples of its prompt [P, K]; they add up to zero.

    Raises:
        ValueError: A prompt has one sample only.
    """
    samples = rewards_PK.shape[1]
    if samples < 2:
        raise ValueError("Leave-one-out advantages need at least two samples of a prompt.")
    return (rewards_PK - rewards_PK.mean(1, keepdim=True)) * (samples / (samples - 1))


def grpo_advantages(rewards_PK: Tensor, *, eps: float = 1e-6) -> Tensor:
    """A_i = (r_i − mean) / (std + eps) over the samples of a prompt [P, K]; 0 where all rewards are equal.

    Raises:
        ValueError: A prompt has one sample only.
    """
    if rewards_PK.shape[1] < 2:
        raise ValueError("Advantages within a group need at least two samples of a prompt.")
    centred_PK = rewards_PK - rewards_PK.mean(1, keepdim=True)
    tied_P1 = (rewards_PK == rewards_PK[:, :1]).all(1, keepdim=True)  # rounding may leave a spread
    return (centred_PK / (rewards_PK.std(1, keepdim=True) + eps)).masked_fill(tied_P1, 0.0)


def _token_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    mask_BT = mask_BT.to(values_BT.dtype)
    return (values_BT * mask_BT).sum() / mask_BT.sum().clamp(min=1)
