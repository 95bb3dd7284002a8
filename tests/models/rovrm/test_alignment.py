"""Checks 21 and 22: scaled rewards, advantages and clipped losses against numbers done by hand."""

from __future__ import annotations

import pytest
import torch

from eagleray.models.gram.alignment import dpo_loss
from eagleray.models.rovrm.alignment import (
    RewardQueue,
    clipped_policy_loss,
    clipped_value_loss,
    generalised_advantages,
    grpo_advantages,
    kl_size,
    rloo_advantages,
)

REWARDS = torch.tensor([0.2, 0.4, 0.9, 1.1], dtype=torch.float64)


def test_check_21_rewards_are_standardised_by_recent_ones() -> None:
    standardised = [-10.706196, -5.947887, 5.947887, 10.706196]
    unclipped = RewardQueue(scale=10, clip=100)(REWARDS)
    torch.testing.assert_close(unclipped, torch.tensor(standardised).double(), atol=1e-5, rtol=0)
    clipped = RewardQueue(scale=10)(REWARDS)
    torch.testing.assert_close(
        clipped, torch.tensor([-10, -5.947887, 5.947887, 10]).double(), atol=1e-5, rtol=0
    )
    ours = RewardQueue()(REWARDS)
    torch.testing.assert_close(ours, torch.tensor(standardised).double() / 10, atol=1e-6, rtol=0)


def test_check_21_a_queue_forgets_goes_on_and_starts_without_a_spread() -> None:
    queue = RewardQueue(size=4)
    assert queue(torch.tensor([3.0])).tolist() == [3.0]  # the deviation of one value is NaN
    assert queue(torch.tensor([3.0])).tolist() == [3.0] and queue(torch.tensor([30.0 - 27])).tolist() == [3.0]
    torch.testing.assert_close(queue(REWARDS), RewardQueue()(REWARDS))  # the first three are forgotten
    other = RewardQueue(size=4)
    other.load_state_dict(queue.state_dict())
    torch.testing.assert_close(other(REWARDS[:1]), queue(REWARDS[:1]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        queue(torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match="`size` is 0; it must be positive"):
        RewardQueue(size=0)


def test_check_21_advantages() -> None:
    rewards, values = torch.tensor([[0.0, -0.1, 2.0]]), torch.tensor([[0.5, 0.6, 0.7]])
    advantages, returns = generalised_advantages(rewards, values, torch.ones(1, 3))
    torch.testing.assert_close(advantages, torch.tensor([[1.237319, 1.215650, 1.3]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(returns, torch.tensor([[1.737319, 1.815650, 2.0]]), atol=1e-6, rtol=0)
    # With gamma = lambda = 1 a return is the sum of the rewards to come.
    _, sums = generalised_advantages(rewards, values, torch.ones(1, 3), gamma=1, lam=1)
    torch.testing.assert_close(sums, torch.tensor([[1.9, 1.9, 2.0]]))


def test_check_21_what_stands_behind_an_answer_does_not_count() -> None:
    rewards, values = torch.tensor([[0.0, -0.1, 2.0]]), torch.tensor([[0.5, 0.6, 0.7]])
    padded = [torch.cat([part, torch.tensor([[9.0, -9.0]])], dim=1) for part in (rewards, values)]
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    for found, alone in zip(
        generalised_advantages(*padded, mask),
        generalised_advantages(rewards, values, torch.ones(1, 3)),
        strict=True,
    ):
        torch.testing.assert_close(found[:, :3], alone)
        assert not found[:, 3:].any()
    with pytest.raises(ValueError, match=r"Rewards \(1, 3\), values \(1, 5\) and mask \(1, 5\)"):
        generalised_advantages(rewards, padded[1], mask)


def test_check_21_the_logged_divergence_holds_no_reward() -> None:
    policy, reference = torch.tensor([[-1.0, -2.0, -7.0]]), torch.tensor([[-1.5, -1.0, 0.0]])
    assert kl_size(policy, reference, torch.tensor([[1, 1, 0]])).item() == pytest.approx(0.1 * 0.75)


def test_check_21_clipped_losses() -> None:
    old = torch.zeros(1, 2)
    logps = torch.tensor([[0.5, -0.5]]).requires_grad_()
    loss = clipped_policy_loss(logps, old, torch.tensor([[1.0, -1.0]]), torch.ones(1, 2))
    # Ratios 1.65 and 0.61, both beyond the clip on the side that gains: 1.2 and 0.8, and no gradient.
    assert loss.item() == pytest.approx((-1.2 + 0.8) / 2)
    loss.backward()
    assert not logps.grad.any()  # type: ignore[union-attr]
    same = clipped_policy_loss(old, old, torch.tensor([[3.0, 1.0]]), torch.tensor([[1, 0]]))
    assert same.item() == -3.0
    values = clipped_value_loss(
        torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[1.0]]), torch.ones(1, 1)
    )
    assert values.item() == pytest.approx(0.5 * 0.8**2)  # 0.2 is as far as it may go


def test_check_22_leave_one_out_and_group_advantages() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.3, 0.3, 0.3]])
    found = rloo_advantages(rewards)
    torch.testing.assert_close(found[0], torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5]))
    torch.testing.assert_close(found.sum(1), torch.zeros(2))
    grouped = grpo_advantages(rewards)
    torch.testing.assert_close(grouped[0], (rewards[0] - 3) / rewards[0].std(), atol=1e-5, rtol=0)
    assert not grouped[1].any()
    for advantages in (rloo_advantages, grpo_advantages):
        with pytest.raises(ValueError, match="at least two samples of a prompt"):
            advantages(torch.ones(2, 1))


def test_check_22_dpo() -> None:
    values = [torch.tensor([v], dtype=torch.float64) for v in (-12.0, -15.0, -13.0, -14.5)]
    assert dpo_loss(*values, beta=0.1).item() == pytest.approx(0.620957, abs=1e-6)
    policy = values[:2]
    assert dpo_loss(*policy, *policy).item() == pytest.approx(0.693147, abs=1e-6)
