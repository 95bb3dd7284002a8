"""Check 16: the Plackett-Luce loss, by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from eagleray.models.rovrm.losses import plackett_luce_loss


@pytest.mark.parametrize(
    ("rewards", "loss"),
    [
        ([1.3, 0.4], 0.341154),
        ([2.0, 1.0, 0.5], 0.938446),
        ([200.0, 0.0], 0.0),
        ([0.0, 200.0], 200.0),
        ([7.0], 0.0),
        ([0.0, 0.0], math.log(2)),
        ([0.0, 0.0, 0.0], math.log(6)),
    ],
)
def test_check_16_values(rewards: list[float], loss: float) -> None:
    assert plackett_luce_loss(torch.tensor([rewards])).item() == pytest.approx(loss, abs=1e-6)
    shifted = torch.tensor([rewards], dtype=torch.float64) + 37.5
    assert plackett_luce_loss(shifted).item() == pytest.approx(loss, abs=1e-6)


def test_check_16_two_answers_are_bradley_terry() -> None:
    rewards_B2 = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    expected = F.softplus(rewards_B2[:, 1] - rewards_B2[:, 0])
    torch.testing.assert_close(plackett_luce_loss(rewards_B2), expected.mean())
    torch.testing.assert_close(plackett_luce_loss(rewards_B2, reduction="sum"), expected.sum())


def test_it_is_the_likelihood_of_the_ranking() -> None:
    """exp(−loss) over all orders of three answers sums to one."""
    import itertools

    rewards = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
    total = sum(
        math.exp(-plackett_luce_loss(rewards[list(order)][None]).item())
        for order in itertools.permutations(range(3))
    )
    assert total == pytest.approx(1.0, abs=1e-12)


def test_prompts_with_fewer_answers_share_a_batch() -> None:
    rewards_BK = torch.tensor([[2.0, 1.0, 0.5], [1.3, 0.4, 1e9], [5.0, 7.0, -7.0]], requires_grad=True)
    mask_BK = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    loss = plackett_luce_loss(rewards_BK, mask_BK, reduction="sum")
    assert loss.item() == pytest.approx(0.938446 + 0.341154, abs=1e-5)
    [gradient] = torch.autograd.grad(loss, rewards_BK)
    assert torch.isfinite(gradient).all() and not gradient[~mask_BK].any() and not gradient[2].any()


def test_half_precision_rewards_are_computed_in_float32() -> None:
    loss = plackett_luce_loss(torch.tensor([[1.3, 0.4]], dtype=torch.bfloat16))
    assert loss.dtype == torch.float32


def test_gradcheck() -> None:
    rewards_BK = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    mask_BK = torch.tensor([[True, True, True], [True, True, False]])
    assert torch.autograd.gradcheck(lambda r: plackett_luce_loss(r, mask_BK), (rewards_BK,))
