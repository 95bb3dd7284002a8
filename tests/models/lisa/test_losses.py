from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from eagleray.models.lisa.losses import (
    attention_kl,
    logit_distillation,
    next_token_loss,
    output_mse,
    score_mse,
)


def test_attention_kl_counts_visible_keys_of_real_rows() -> None:
    """Two rows of KL ln 2 each: (1, 0) against (1/2, 1/2). Padding rows and hidden keys hold rubbish."""
    target = torch.tensor([[[[50.0, 0.0, 9.0], [50.0, 0.0, 9.0], [1.0, 2.0, 3.0]]]])
    scores = torch.tensor([[[[0.0, 0.0, torch.inf], [3.0, 3.0, -7.0], [9.0, 2.0, 1.0]]]])
    mask = torch.tensor([[[[True, True, False]]]]).expand(1, 1, 3, 3)
    rows = torch.tensor([[True, True, False]])
    assert attention_kl(target, scores, mask, rows).item() == pytest.approx(math.log(2))
    assert attention_kl(target, scores, mask, rows, reduction="sum").item() == pytest.approx(2 * math.log(2))


def test_score_mse_ignores_the_level_of_a_row() -> None:
    """Differences (0, 2) and (5, 5): after centring (-1, 1) and (0, 0), so 1 and 0."""
    target = torch.tensor([[[[1.0, 3.0, 8.0], [5.0, 5.0, 8.0]]]])
    mask = torch.tensor([True, True, False]).expand(1, 1, 2, 3)
    rows = torch.ones(1, 2, dtype=torch.bool)
    scores = torch.tensor([[[[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]]])
    assert score_mse(target, scores, mask, rows).item() == pytest.approx(0.5)
    assert score_mse(target, scores + 7, mask, rows).item() == pytest.approx(0.5)


def test_output_mse_is_relative() -> None:
    """Half of every output is missing: a quarter of its power, whatever the scale."""
    target = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    rows = torch.ones(2, 5, dtype=torch.bool)
    for scale in (1.0, 100.0):
        assert output_mse(scale * target, scale * target / 2, rows).item() == pytest.approx(0.25)
    rows[1] = False
    spoilt = target.clone()
    spoilt[1] = 1e6
    assert output_mse(spoilt, target / 2, rows).item() == pytest.approx(0.25)


def test_distillation_of_logits_agrees_with_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(2, 3, 7, generator=generator) for _ in range(2))
    rows = torch.tensor([[True, True, False], [True, True, True]])
    log_q, log_p = ((x / 2).log_softmax(-1)[rows] for x in (student, teacher))
    expected = 4 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    torch.testing.assert_close(logit_distillation(teacher, student, rows, temperature=2.0), expected)
    assert logit_distillation(teacher, teacher, rows).item() == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="`temperature` is 0"):
        logit_distillation(teacher, student, rows, temperature=0)


def test_next_token_loss_skips_padding() -> None:
    """Uniform logits over 4 tokens: ln 4 at each of the 2 + 1 positions whose token and target are real."""
    logits, ids = torch.zeros(2, 4, 4), torch.ones(2, 4, dtype=torch.long)
    rows = torch.tensor([[True, True, True, False], [False, False, True, True]])
    assert next_token_loss(logits, ids, rows, reduction="sum").item() == pytest.approx(3 * math.log(4))
    assert next_token_loss(logits, ids, rows).item() > 0


def test_losses_have_gradients_without_nan() -> None:
    mask = torch.ones(3, 3, dtype=torch.bool).tril().expand(1, 1, 3, 3)
    rows = torch.tensor([[False, True, True]])
    target = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    scores = torch.zeros(1, 2, 3, 3, requires_grad=True)
    (attention_kl(target, scores, mask, rows) + score_mse(target, scores, mask, rows)).backward()
    assert scores.grad is not None and scores.grad.isfinite().all()
    assert not scores.grad.masked_select(~mask).any() and not scores.grad[:, :, 0].any()
