"""Acceptance checks 18, 20, 21 and the DPO part of 22."""

from __future__ import annotations

import pytest
import torch

from eagleray.models.gram.alignment import (
    dpo_loss,
    dpo_margin,
    kl_best_of_n,
    ppo_token_rewards,
    transform_reward,
)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_check_18_reward_transforms() -> None:
    reward = doubles(0.5638)
    assert transform_reward(reward).item() == 0.5638
    assert transform_reward(reward, "centred").item() == pytest.approx(0.127600, abs=1e-6)
    assert transform_reward(reward, "logit").item() == pytest.approx(0.256599, abs=1e-6)


def test_logit_reward_is_clipped() -> None:
    rewards = transform_reward(doubles(0.0, 0.5, 1.0), "logit", clip=3.0)
    torch.testing.assert_close(rewards, doubles(-3.0, 0.0, 3.0))
    with pytest.raises(ValueError, match="`clip` is 0; it must be positive"):
        transform_reward(rewards, "logit", clip=0)
    with pytest.raises(ValueError, match="`transform` is 'log'; it must be 'prob', 'centred' or 'logit'"):
        transform_reward(rewards, "log")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n", "kl"),
    [
        (1, 0.0),
        (2, 0.193147),
        (4, 0.636294),
        (8, 1.204442),
        (16, 1.835089),
        (32, 2.496986),
        (64, 3.174508),
        (128, 3.859843),
    ],
)
def test_check_20_kl_of_best_of_n(n: int, kl: float) -> None:
    assert kl_best_of_n(n) == pytest.approx(kl, abs=6e-7)


def test_kl_needs_a_sample() -> None:
    with pytest.raises(ValueError, match="`n` is 0; best-of-n needs at least one sample"):
        kl_best_of_n(0)


def test_check_21_ppo_token_rewards() -> None:
    log_ratios = doubles(0.2, -0.1, 0.4)[None]
    reference = doubles(-1.0, -2.0, -3.0)[None]
    mask = torch.ones(1, 3, dtype=torch.bool)
    rewards = ppo_token_rewards(reference + log_ratios, reference, mask, doubles(0.5638), beta=0.05)
    torch.testing.assert_close(rewards, doubles(-0.010000, 0.005000, 0.543800)[None])


def test_ppo_rewards_ignore_padding_on_either_side() -> None:
    """The sequence reward lands on the last response token, wherever padding is."""
    mask = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 1, 1]])
    policy, reference = torch.full((2, 5), -1.0), torch.full((2, 5), -3.0)
    rewards = ppo_token_rewards(policy, reference, mask, torch.tensor([0.5, 0.25]), beta=0.1)
    expected = torch.tensor([[0.0, 0.0, -0.2, 0.3, 0.0], [-0.2, -0.2, -0.2, -0.2, 0.05]])
    torch.testing.assert_close(rewards, expected)


def test_ppo_rewards_need_a_response() -> None:
    empty = torch.zeros(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="needs at least one response token"):
        ppo_token_rewards(torch.zeros(1, 3), torch.zeros(1, 3), empty, torch.zeros(1), beta=0.1)


def test_check_22_dpo() -> None:
    log_probabilities = [doubles(value) for value in (-10.0, -11.0, -12.0, -11.5)]
    assert dpo_margin(*log_probabilities, beta=0.1).item() == pytest.approx(0.15)
    assert dpo_loss(*log_probabilities, beta=0.1).item() == pytest.approx(0.620957, abs=6e-7)
    assert dpo_loss(*log_probabilities, beta=0.1, smoothing=0.1).item() == pytest.approx(0.635957, abs=6e-7)
