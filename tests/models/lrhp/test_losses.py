"""Head and loss (checks 1, 2 and 5), and margin losses (checks 13 to 15), against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from eagleray.models.gram.discriminative import bradley_terry_loss
from eagleray.models.lrhp.losses import order_loss, symmetry_penalty
from eagleray.models.lrhp.model import FloatLinear


def _head() -> FloatLinear:
    head = FloatLinear(3, 1).double()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.5, -1.0, 2.0]]))
        head.bias.fill_(0.1)
    return head


def test_check_1_head_and_loss() -> None:
    h_BD = torch.tensor([[0.2, 0.4, 0.6], [-0.1, 0.5, -0.3]], dtype=torch.float64)
    u_B = _head()(h_BD)[:, 0].detach()
    assert u_B.tolist() == pytest.approx([1.0, -1.05], abs=1e-6)
    assert torch.sigmoid(u_B[0]).item() == pytest.approx(0.731059, abs=1e-6)
    for u, z, expected in ((u_B[:1], 1, 0.313262), (u_B[:1], 0, 1.313262), (u_B[1:], 0, 0.300058)):
        assert order_loss(u, torch.tensor([z])).item() == pytest.approx(expected, abs=1e-6)
    assert order_loss(u_B, torch.tensor([1, 0])).item() == pytest.approx(0.306660, abs=1e-6)


def test_check_2_difference_range_and_gradient() -> None:
    u_B = torch.linspace(-9, 9, 37, dtype=torch.float64)
    for u in u_B:
        one, zero = (order_loss(u[None], torch.tensor([z])).item() for z in (1, 0))
        assert one - zero == pytest.approx(-u.item(), abs=1e-6)
    extreme_B = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    loss = order_loss(extreme_B, torch.tensor([1, 1, 0, 0]))
    assert loss.item() == pytest.approx(5000.0)
    z_B = torch.arange(37) % 2
    u_B.requires_grad_()
    order_loss(u_B, z_B, reduction="sum").backward()
    assert u_B.grad is not None
    torch.testing.assert_close(u_B.grad, torch.sigmoid(u_B.detach()) - z_B, atol=1e-12, rtol=0)


def test_check_5_an_untrained_head_is_undecided() -> None:
    loss = order_loss(torch.zeros(4), torch.tensor([0, 1, 0, 1]), reduction="sum")
    assert loss.item() / 4 == pytest.approx(math.log(2), abs=1e-6)


def test_smoothing_moves_the_least_loss_to_a_finite_logit() -> None:
    """The minimum of the loss with target t lies at log(t / (1 − t)): log 19 for ε = 0.1."""
    u_B = torch.tensor([math.log(19)], dtype=torch.float64, requires_grad=True)
    order_loss(u_B, torch.tensor([1]), smoothing=0.1).backward()
    assert u_B.grad is not None and abs(u_B.grad.item()) < 1e-12


def test_the_symmetry_penalty_is_zero_where_swapping_negates() -> None:
    u_B = torch.tensor([0.5, -2.0])
    assert symmetry_penalty(u_B, -u_B).item() == 0
    assert symmetry_penalty(u_B, torch.tensor([0.5, 1.0])).item() == pytest.approx(2.0)


# ---------------------------------------------------------------- adaptive margins in Bradley-Terry (spec 7)


@pytest.mark.parametrize(
    ("margin", "loss", "slope"),
    [
        (0.0, 0.313262, -0.268941),
        (0.5, 0.474077, -0.377541),
        (1.0, 0.693147, -0.5),
        (2.0, 1.313262, -0.731059),
    ],
)
def test_check_13_margin_loss(margin: float, loss: float, slope: float) -> None:
    chosen_B = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    found = bradley_terry_loss(chosen_B, torch.tensor([0.5]).double(), margin_B=torch.tensor([margin]))
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-6)
    assert chosen_B.grad is not None and chosen_B.grad.item() == pytest.approx(slope, abs=1e-6)


def _rewards(count: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(count, generator=generator),
        torch.randn(count, generator=generator),
        torch.rand(count, generator=generator),
    )


def test_check_13_the_loss_grows_with_the_margin_and_scale_0_is_plain_bradley_terry() -> None:
    chosen_B, rejected_B, margin_B = _rewards()
    values = [
        bradley_terry_loss(chosen_B, rejected_B, margin_B=margin_B, margin_scale=scale).item()
        for scale in (0.0, 0.25, 0.5, 1.0, 2.0)
    ]
    assert values == sorted(values) and values[0] < values[-1]
    assert values[0] == bradley_terry_loss(chosen_B, rejected_B).item()  # bit for bit


@pytest.mark.parametrize("name", ["margin_B", "weight_B"])
def test_check_14_shapes_are_guarded(name: str) -> None:
    """Rewards [B, 1] minus margins [B] would be [B, B] terms without a word."""
    chosen_B, rejected_B, margin_B = _rewards(4)
    options: dict[str, Any] = {name: margin_B}
    with pytest.raises(ValueError, match=rf"`{name}` has the shape \(4,\).*rewards.*\(4, 1\)"):
        bradley_terry_loss(chosen_B[:, None], rejected_B[:, None], **options)
    with pytest.raises(ValueError, match="`rejected_B` has the shape"):
        bradley_terry_loss(chosen_B, rejected_B[:, None])
    whole = bradley_terry_loss(chosen_B, rejected_B, **options)
    single = [
        bradley_terry_loss(
            chosen_B[i : i + 1], rejected_B[i : i + 1], **{**options, name: margin_B[i : i + 1]}
        )
        for i in range(4)
    ]
    torch.testing.assert_close(whole, torch.stack(single).mean())


@pytest.mark.parametrize("options", [{}, {"margin_B": torch.rand(64)}, {"weight_B": torch.rand(64)}])
def test_check_15_translation(options: dict[str, Any]) -> None:
    chosen_B, rejected_B, _ = (t.double() for t in _rewards())
    torch.testing.assert_close(
        bradley_terry_loss(chosen_B + 7.5, rejected_B + 7.5, **options),
        bradley_terry_loss(chosen_B, rejected_B, **options),
    )


def test_check_15_swapping_the_answers_flips_the_label() -> None:
    u_B = torch.tensor([0.3, -1.2, 4.0])
    torch.testing.assert_close(order_loss(-u_B, torch.zeros(3)), order_loss(u_B, torch.ones(3)))


def test_weights_of_one_leave_bradley_terry_and_weights_scale_each_term() -> None:
    chosen_B, rejected_B, weight_B = _rewards()
    assert bradley_terry_loss(chosen_B, rejected_B, weight_B=torch.ones(64)) == bradley_terry_loss(
        chosen_B, rejected_B
    )
    expected = (weight_B * F.softplus(rejected_B - chosen_B)).mean()
    torch.testing.assert_close(bradley_terry_loss(chosen_B, rejected_B, weight_B=weight_B), expected)
