"""Losses of pair representations (spec 3): which of the two answers, in the order shown, is the better one.

    L = z softplus(−u) + (1 − z) softplus(u)        dL/du = σ(u) − z

Shapes: B sequences.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def order_loss(
    u_B: Tensor, z_B: Tensor, *, smoothing: float = 0.0, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """Binary cross-entropy of the order, in float32 or better.

    Args:
        u_B: Logits that the answer shown first is better.
        z_B: 1 where it is, 0 where it is not.
        smoothing: ε in [0, 0.5): z becomes z (1 − ε) + ε/2.
        reduction: A training loop that accumulates takes `sum`.

    >>> u, z = torch.tensor([1.0, -1.05]).double(), torch.tensor([1, 0])
    >>> round(order_loss(u, z).item(), 6)
    0.30666
    """
    u_B = u_B.to(torch.promote_types(u_B.dtype, torch.float32))
    target_B = z_B.to(u_B.dtype) * (1 - smoothing) + smoothing / 2
    loss_B = target_B * F.softplus(-u_B) + (1 - target_B) * F.softplus(u_B)
    return loss_B.mean() if reduction == "mean" else loss_B.sum()


def symmetry_penalty(u_forward_B: Tensor, u_backward_B: Tensor) -> Tensor:
    """Sum of (u(x, y_1, y_2) + u(x, y_2, y_1))²: zero where swapping the answers negates the logit."""
    return (u_forward_B.float() + u_backward_B.float()).square().sum()
