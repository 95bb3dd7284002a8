"""The head-alignment network f: mixes the heads of a score tensor at every (query, key) position alike.

Section 5.1 of the paper transposes scores to heads-last, applies a feed-forward network and transposes back. The
same numbers come out of matrix products from the left on heads-first scores, without the two copies:

    linear       M s                          ffn       W2 σ(W1 s + b1) + b2
    linear+ffn   M s + W2 σ(W1 s + b1) + b2   ffn_res   s + W2 σ(W1 s + b1) + b2
    glu          W2 (σ(Wg s) ⊙ W1 s)          identity  s   (direct sharing)

As f sees one position at a time, it can break neither causality nor padding nor cached decoding.

Shapes: B sequences, H heads, M hidden units, N = queries x keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from eagleray.models.lisa.spec import AlignSpec

_ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu}


class HeadAlignment(nn.Module):
    """f of one shared layer.

    Args:
        spec: Kind, activation, biases.
        heads: H.
        width: M; ignored by kinds without a hidden layer.
    """

    def __init__(self, spec: AlignSpec, *, heads: int, width: int) -> None:
        super().__init__()
        self.kind = spec.kind
        self._act = _ACTIVATIONS[spec.act]
        hidden = spec.kind in ("ffn", "ffn_res", "linear+ffn", "glu")
        bias = spec.bias and spec.kind != "glu"
        self.m = _parameter(spec.kind in ("linear", "linear+ffn"), heads, heads)
        self.w1 = _parameter(hidden, width, heads)
        self.b1 = _parameter(hidden and bias, width, 1)
        self.wg = _parameter(spec.kind == "glu", width, heads)
        self.w2 = _parameter(hidden, heads, width)
        self.b2 = _parameter(hidden and bias, heads, 1)

    @torch.no_grad()
    def reset(self) -> None:
        """Random weights that start close to direct sharing: M = 1 and, beside a linear path, W2 = 0."""
        for name, parameter in self.named_parameters():
            if name in ("b1", "b2"):
                init.zeros_(parameter)
            elif name == "m":
                init.eye_(parameter)
            elif name == "w2" and self.kind in ("ffn_res", "linear+ffn"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=0.02)

    def forward(self, scores: Tensor) -> Tensor:
        """Scores [B, H, ...] of the source layer -> aligned scores of the same shape."""
        if self.kind == "identity":
            return scores
        if self.kind == "none":
            return torch.zeros_like(scores)
        s_BHN = scores.flatten(2)
        m, w1, b1, wg, w2, b2 = (
            None if p is None else p.to(scores.dtype)
            for p in (self.m, self.w1, self.b1, self.wg, self.w2, self.b2)
        )
        mixed_BHN = b2
        if m is not None:
            mixed_BHN = _affine(m, s_BHN, b2)
        elif self.kind == "ffn_res":
            mixed_BHN = s_BHN if b2 is None else s_BHN + b2
        if w1 is not None and w2 is not None:
            hidden_BMN = _affine(w1, s_BHN, b1)
            if wg is not None:
                hidden_BMN = self._act(torch.matmul(wg, s_BHN)) * hidden_BMN
            else:
                hidden_BMN = self._act(hidden_BMN)
            own = mixed_BHN is not s_BHN and mixed_BHN is not b2 and not torch.is_grad_enabled()
            mixed_BHN = _affine(w2, hidden_BMN, mixed_BHN, in_place=own)
        assert mixed_BHN is not None, "every kind has a linear path, a hidden layer or both"
        return mixed_BHN.view(scores.shape)


def _affine(weight: Tensor, x_BIN: Tensor, plus: Tensor | None, *, in_place: bool = False) -> Tensor:
    """weight @ x + plus in one pass; `in_place` adds to `plus` itself."""
    if plus is None:
        return torch.matmul(weight, x_BIN)
    weights = weight.expand(len(x_BIN), -1, -1)
    return torch.baddbmm(plus, weights, x_BIN, out=plus if in_place else None)


def _parameter(wanted: bool, *shape: int) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(shape)) if wanted else None
