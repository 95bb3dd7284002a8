"""Acceptance checks 1 to 10, 12, 28 and 29 of the GRAM specification, and the errors of the losses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eagleray.models.gram.losses import (
    full_vocab_loss,
    pair_logit_loss,
    preference_loss,
    smoothing_optimum,
    wrong_label_mass,
)

EPSILONS = (0.0, 0.05, 0.1, 0.15, 0.2)
EQUATION_4 = {
    -2.0: (2.126928, 2.026928, 1.926928, 1.826928, 1.726928),
    -0.5: (0.974077, 0.949077, 0.924077, 0.899077, 0.874077),
    0.0: (0.693147, 0.693147, 0.693147, 0.693147, 0.693147),
    0.5: (0.474077, 0.499077, 0.524077, 0.549077, 0.574077),
    1.0: (0.313262, 0.363262, 0.413262, 0.463262, 0.513262),
    2.0: (0.126928, 0.226928, 0.326928, 0.426928, 0.526928),
    3.0: (0.048587, 0.198587, 0.348587, 0.498587, 0.648587),
}


def close(value: Tensor | float, expected: float) -> bool:
    number = value.item() if isinstance(value, Tensor) else value
    return number == pytest.approx(expected, abs=6e-7)


def scalar(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64, requires_grad=True)


def pair(a: float, b: float) -> Tensor:
    return torch.tensor([[a, b]], dtype=torch.float64, requires_grad=True)


A, B = torch.tensor([0]), torch.tensor([1])


@pytest.mark.parametrize("delta", EQUATION_4)
def test_check_01_values_of_equation_4(delta: float) -> None:
    for epsilon, expected in zip(EPSILONS, EQUATION_4[delta], strict=True):
        assert close(preference_loss(scalar(delta), smoothing=epsilon), expected)


def test_check_02_equation_3_kl_and_label_flips_are_the_same_loss() -> None:
    epsilon, delta = 0.1, 1.0
    p = torch.sigmoid(torch.tensor(delta, dtype=torch.float64))
    equation_3 = -(1 - epsilon) * p.log() - epsilon * (1 - p).log()
    kl = (1 - epsilon) * ((1 - epsilon) / p).log() + epsilon * (epsilon / (1 - p)).log()
    flips = (1 - epsilon) * preference_loss(scalar(delta)) + epsilon * preference_loss(scalar(-delta))
    entropy = smoothing_optimum(epsilon).loss
    assert close(kl, 0.088179)
    assert close(entropy, 0.325083)
    for value in (equation_3, kl + entropy, flips, preference_loss(scalar(delta), smoothing=epsilon)):
        assert close(value, 0.413262)


def test_check_03_torch_convention_is_the_smoothing_of_cross_entropy() -> None:
    for delta, expected in ((1.0, 0.363262), (3.0, 0.198587)):
        ours = preference_loss(scalar(delta), smoothing=0.1, convention="torch")
        library = F.cross_entropy(pair(delta, 0.0), A, label_smoothing=0.1)
        assert close(ours, expected)
        assert close(library, expected)
        assert close(preference_loss(scalar(delta), smoothing=0.05), expected)


def test_check_04_label_b_and_swap_of_label_and_logits() -> None:
    assert close(pair_logit_loss(pair(1.0, 0.0), B, smoothing=0.1), 1.213262)
    assert close(pair_logit_loss(pair(1.0, 0.0), A, smoothing=0.1), 0.413262)
    assert close(pair_logit_loss(pair(0.0, 1.0), B, smoothing=0.1), 0.413262)


def test_check_05_both_orders_of_one_pair() -> None:
    logits = torch.tensor([[2.0, 0.5], [1.2, 0.4]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    paper = pair_logit_loss(logits, labels, smoothing=0.1, reduction="none")
    torch_convention = pair_logit_loss(logits, labels, smoothing=0.1, convention="torch", reduction="none")
    assert close(paper[0], 0.351413)
    assert close(paper[1], 1.091101)
    assert close(pair_logit_loss(logits, labels, smoothing=0.1), 0.721257)
    assert close(torch_convention[0], 0.276413)
    assert close(torch_convention[1], 1.131101)


@pytest.mark.parametrize(
    ("delta", "epsilon", "gradient"),
    [(0, 0.1, -0.4), (1, 0.1, -0.168941), (3, 0.1, 0.052574), (3, 0.05, 0.002574), (-2, 0, -0.880797)],
)
def test_check_06_gradient(delta: float, epsilon: float, gradient: float) -> None:
    margin = scalar(float(delta))
    preference_loss(margin, smoothing=epsilon).backward()
    assert margin.grad is not None and close(margin.grad, gradient)

    logits = pair(float(delta), 0.0)
    pair_logit_loss(logits, A, smoothing=epsilon).backward()
    assert logits.grad is not None
    assert close(logits.grad[0, 0], gradient)
    assert close(logits.grad[0, 1], -gradient)


@pytest.mark.parametrize(("delta", "curvature"), [(0.0, 0.25), (1.0, 0.196612), (3.0, 0.045177)])
def test_check_06_second_derivative(delta: float, curvature: float) -> None:
    margin = scalar(delta)
    (first,) = torch.autograd.grad(preference_loss(margin, smoothing=0.1), margin, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), margin)
    assert close(second, curvature)


@pytest.mark.parametrize(
    ("epsilon", "delta", "probability", "loss"),
    [
        (0.025, 3.663562, 0.975, 0.116907),
        (0.05, 2.944439, 0.95, 0.198515),
        (0.075, 2.512306, 0.925, 0.266384),
        (0.1, 2.197225, 0.9, 0.325083),
        (0.15, 1.734601, 0.85, 0.422709),
        (0.2, 1.386294, 0.8, 0.500402),
    ],
)
def test_check_07_optimum(epsilon: float, delta: float, probability: float, loss: float) -> None:
    optimum = smoothing_optimum(epsilon)
    assert close(optimum.delta, delta)
    assert close(optimum.probability, probability)
    assert close(optimum.loss, loss)
    margin = scalar(optimum.delta)
    value = preference_loss(margin, smoothing=epsilon)
    value.backward()
    assert close(value, loss)
    assert margin.grad is not None and abs(margin.grad.item()) < 1e-12


def test_check_07_without_smoothing_it_is_bradley_terry() -> None:
    margins = torch.linspace(-30, 30, 61, dtype=torch.float64, requires_grad=True)
    ours = torch.autograd.grad(preference_loss(margins, reduction="sum"), margins)[0]
    plain = torch.autograd.grad(-torch.sigmoid(margins).log().sum(), margins)[0]
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(preference_loss(margins), -torch.sigmoid(margins).log().mean())
    assert smoothing_optimum(0.0) == (math.inf, 1.0, 0.0)


def test_check_08_shift_of_all_logits_changes_nothing() -> None:
    assert close(pair_logit_loss(pair(1.0, 0.0) + 5, A, smoothing=0.1), 0.413262)
    full = torch.tensor([[2.0, 1.0, 0.5, -1.0]], dtype=torch.float64)
    assert close(full_vocab_loss(full + 5, A, (0, 1), smoothing=0.1), 0.595182)


def test_check_09_full_vocabulary() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]], dtype=torch.float64, requires_grad=True)
    full = full_vocab_loss(logits, A, (0, 1), smoothing=0.1)
    two_way = pair_logit_loss(logits[:, :2], A, smoothing=0.1)
    mass = logits.softmax(-1)[0, :2].sum()
    assert close(full, 0.595182)
    assert close(mass, 0.833668)
    assert close(full - two_way, 0.181920)
    assert close(full - two_way, -math.log(mass.item()))

    (gradient,) = torch.autograd.grad(full, logits)
    for value, expected in zip(gradient[0], (-0.290540, 0.124208, 0.135989, 0.030343), strict=True):
        assert close(value, expected)
    assert close(gradient.sum(), 0.0)
    (gradient,) = torch.autograd.grad(two_way, logits)
    for value, expected in zip(gradient[0], (-0.168941, 0.168941, 0.0, 0.0), strict=True):
        assert close(value, expected)


def test_check_09_full_vocabulary_equals_cross_entropy_for_any_label_ids() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 11, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0, 1])
    ids = torch.tensor([7, 3])[labels]
    torch.testing.assert_close(full_vocab_loss(logits, labels, (7, 3)), F.cross_entropy(logits, ids))


def test_check_10_accumulation_divides_by_the_global_batch() -> None:
    """Micro-batch sums over the global count give the mean of all six, 0.566667, however they are split."""
    values = [0.4, 0.6, 0.8, 1.0, 0.2, 0.4]
    margins = torch.tensor([math.log(1 / math.expm1(v)) for v in values], dtype=torch.float64)
    gradients = []
    for splits in ((6,), (4, 2), (1,) * 6):
        weights = margins.clone().requires_grad_()
        total = 0.0
        for micro_batch in weights.split(splits):
            loss = preference_loss(micro_batch, reduction="sum") / len(values)
            loss.backward(retain_graph=True)
            total += loss.item()
        assert close(total, 0.566667)
        gradients.append(weights.grad)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], atol=1e-12, rtol=0)


def test_losses_compute_in_float32_and_stay_finite() -> None:
    margins = torch.tensor([-1e4, 1e4], dtype=torch.bfloat16)
    loss = preference_loss(margins, smoothing=0.1, reduction="none")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([0.9, 0.1]) * margins.float().abs())
    assert full_vocab_loss(torch.zeros(1, 4, dtype=torch.float16), A, (0, 1)).dtype == torch.float32


@pytest.mark.parametrize(
    ("smoothing", "convention"), [(0.5, "paper"), (-0.1, "paper"), (1.0, "torch"), (math.nan, "paper")]
)
def test_smoothing_out_of_range(smoothing: float, convention: str) -> None:
    with pytest.raises(
        ValueError, match=r"`smoothing` is .*; with convention='(paper|torch)' it must be in \[0, "
    ):
        wrong_label_mass(smoothing, convention)  # type: ignore[arg-type]


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="`convention` is 'keras'; it must be 'paper' or 'torch'"):
        wrong_label_mass(0.1, "keras")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`reduction` is 'avg'; it must be 'mean', 'sum' or 'none'"):
        preference_loss(scalar(1.0), reduction="avg")  # type: ignore[arg-type]


def trained_margins(features: Tensor, labels: Tensor, *, smoothing: float, steps: int) -> Tensor:
    """Margins towards the right label of a linear judge, fitted by gradient descent from zero."""
    weights = torch.zeros(features.shape[1], dtype=features.dtype, requires_grad=True)
    for _ in range(steps):
        delta = (1 - 2 * labels) * (features @ weights)
        (gradient,) = torch.autograd.grad(preference_loss(delta, smoothing=smoothing), weights)
        weights.data -= 2.0 * gradient
    return ((1 - 2 * labels) * (features @ weights)).detach()


def test_check_28_smoothing_stops_at_its_probability_and_none_keeps_growing() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(24, 48, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 2, (24,), generator=generator)
    smoothed = [
        trained_margins(features, labels, smoothing=0.1, steps=n).sigmoid().mean() for n in (300, 600)
    ]
    assert smoothed[0] == pytest.approx(0.9, abs=1e-3)
    assert smoothed[1] == pytest.approx(0.9, abs=1e-6)
    plain = [
        trained_margins(features, labels, smoothing=0.0, steps=n).sigmoid().mean()
        for n in (75, 150, 300, 600)
    ]
    assert plain[0] > 0.95
    assert plain == sorted(plain)
    assert 1 - plain[-1] < 0.2 * (1 - plain[0])


def test_check_29_flipped_labels_act_like_smoothing() -> None:
    """One feature that tells the right label, nothing to memorise with: BT finds log((1 - eps)/eps)."""
    generator = torch.Generator().manual_seed(2)
    right = torch.randint(0, 2, (20_000,), generator=generator)
    flipped = torch.rand(20_000, generator=generator) < 0.1
    features = (1.0 - 2.0 * right)[:, None].double()
    observed = torch.where(flipped, 1 - right, right)
    margins = trained_margins(features, observed, smoothing=0.0, steps=200)
    assert margins[~flipped].mean() == pytest.approx(math.log(0.9 / 0.1), abs=0.08)
