"""Losses of the two training phases, as functions of tensors.

Phase A compares one layer's attention with the teacher's: KL of attention rows, squared error of centred scores,
relative squared error of the output. Phase B adds distillation of logits to the language-model loss. Which losses
the paper uses is not known to us; docs/lisa.md has our recipe.

Shapes: B sequences, H heads, Q queries, T keys, V vocabulary. Masks: true where something counts. A row is a query
that is no padding; `sum` sums over rows (already averaged over heads), `mean` divides by their number.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["mean", "sum"]


def attention_kl(
    target: Tensor, scores: Tensor, mask: Tensor, rows: Tensor, *, reduction: Reduction = "mean"
) -> Tensor:
    """KL(softmax(target) ‖ softmax(scores)) of attention rows, averaged over heads.

    Args:
        target: Teacher scores [B, H, Q, T].
        scores: Student scores, same shape.
        mask: Visible keys, broadcastable to [B, H, Q, T].
        rows: Queries that count [B, Q].
        reduction: Over rows.

    >>> target, scores = torch.tensor([[[[0.0, 0.0]]]]), torch.tensor([[[[0.0, 3.0]]]]).log1p()
    >>> ones = torch.ones(1, 1, 1, 2, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    >>> round(attention_kl(target, scores, *ones).item(), 4)  # 1/2 ln(5/2) + 1/2 ln(5/8)
    0.2231
    """
    hidden = ~mask
    log_p = torch.log_softmax(target.float().masked_fill(hidden, torch.finfo(torch.float32).min), -1)
    log_q = torch.log_softmax(scores.float().masked_fill(hidden, torch.finfo(torch.float32).min), -1)
    kl_BHQ = (log_p.exp() * (log_p - log_q)).masked_fill(hidden, 0.0).sum(-1)
    return _over_rows(kl_BHQ.mean(1), rows, reduction)


def score_mse(
    target: Tensor, scores: Tensor, mask: Tensor, rows: Tensor, *, reduction: Reduction = "mean"
) -> Tensor:
    """Mean squared difference of visible scores; each row is centred first, as softmax ignores its level."""
    seen = mask.sum(-1, keepdim=True).clamp(min=1)
    error = (target.float() - scores.float()).masked_fill(~mask, 0.0)
    error = (error - error.sum(-1, keepdim=True) / seen).masked_fill(~mask, 0.0)
    return _over_rows((error.square().sum(-1) / seen[..., 0]).mean(1), rows, reduction)


def output_mse(target: Tensor, output: Tensor, rows: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Squared error of attention outputs [B, Q, width] over the mean square of the teacher's.

    The denominator is one number for the batch: rows with tiny outputs do not outweigh the others.
    """
    target, output = target.float(), output.float()
    power_BQ = target.square().sum(-1)
    level = _over_rows(power_BQ, rows, "mean").clamp(min=torch.finfo(torch.float32).tiny)
    return _over_rows((target - output).square().sum(-1) / level, rows, reduction)


def logit_distillation(
    teacher: Tensor, student: Tensor, rows: Tensor, *, temperature: float = 1.0, reduction: Reduction = "mean"
) -> Tensor:
    """τ² KL(softmax(teacher / τ) ‖ softmax(student / τ)) of logits [B, Q, V].

    Raises:
        ValueError: The temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"`temperature` is {temperature}; it must be positive.")
    log_p = torch.log_softmax(teacher.float() / temperature, -1)
    log_q = torch.log_softmax(student.float() / temperature, -1)
    return temperature**2 * _over_rows((log_p.exp() * (log_p - log_q)).sum(-1), rows, reduction)


def next_token_loss(
    logits: Tensor, input_ids: Tensor, rows: Tensor, *, reduction: Reduction = "mean"
) -> Tensor:
    """Cross-entropy of the next token; a position counts if its target token does.

    Args:
        logits: [B, Q, V].
        input_ids: [B, Q].
        rows: Tokens that are no padding [B, Q].
        reduction: Over positions with a target.
    """
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), input_ids[:, 1:], reduction="none")
    return _over_rows(losses, rows[:, 1:] & rows[:, :-1], reduction)


def _over_rows(value_BQ: Tensor, rows_BQ: Tensor, reduction: Reduction) -> Tensor:
    total = value_BQ.masked_fill(~rows_BQ, 0.0).sum()
    return total if reduction == "sum" else total / rows_BQ.sum().clamp(min=1)
