"""CTC heads and prediction-aware encoding: what a layer predicts is fed back as expected token embeddings.

With P = softmax(head(h)) and a table E [V, D] (spec 4.5), `inter_league` gives h + P E. In curriculum mixing (spec 6)
some rows of P are replaced by a smoothed one-hot of the best alignment; see `curriculum.py`.

Every parameter is used by the module that owns it, so ZeRO-3 gathers it in time.

Shapes: B clips, S frames, V tokens, D width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eagleray.models.nast.curriculum import Oracle, mix_oracle

AdapterKind = Literal["none", "linear", "context", "league", "inter_league", "gated_league"]


class CtcHead(nn.Module):
    """logits = W dropout(x) + b; W [V, D] may be shared with another head."""

    def __init__(self, *, width: int, vocab_size: int, pad_id: int, dropout: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(token_table(vocab_size, width, pad_id))
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.dropout = dropout

    def forward(self, x_BSD: Tensor) -> Tensor:
        return F.linear(F.dropout(x_BSD, self.dropout, self.training), self.weight, self.bias)


class PredictionAdapter(nn.Module):
    """Adds what was predicted to the hidden states (spec 4.5).

    Args:
        kind: `none`: h. `linear`: LN(W2 relu(W1 h)). `context`: P E. `league`: linear + context. `inter_league`: h + P E.
            `gated_league`: g ∘ linear + (1 − g) ∘ context with g = σ(Wg [linear; context]).
        width: Width D.
        vocab_size: Tokens V, rows of E.
        pad_id: Row of E that starts as zero.
    """

    def __init__(self, *, kind: AdapterKind, width: int, vocab_size: int, pad_id: int) -> None:
        super().__init__()
        self.kind: AdapterKind = kind
        if kind not in ("none", "linear"):
            self.weight = nn.Parameter(token_table(vocab_size, width, pad_id))
        if kind in ("linear", "league", "gated_league"):
            self.linear = nn.Sequential(
                nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width), nn.LayerNorm(width)
            )
        if kind == "gated_league":
            self.gate = nn.Linear(2 * width, width)

    def forward(self, h_BSD: Tensor, logits_BSV: Tensor, oracle: Oracle | None = None) -> Tensor:
        if self.kind == "none":
            return h_BSD
        if self.kind == "linear":
            return self.linear(h_BSD)
        p_BSV = logits_BSV.softmax(dim=-1, dtype=torch.float32).to(h_BSD.dtype)
        if oracle is not None:
            p_BSV = mix_oracle(p_BSV, oracle)
        context = F.linear(p_BSV, self.weight.T)
        if self.kind == "context":
            return context
        if self.kind == "inter_league":
            return h_BSD + context
        linear = self.linear(h_BSD)
        if self.kind == "league":
            return linear + context
        gate = torch.sigmoid(self.gate(torch.cat([linear, context], dim=-1)))
        return gate * linear + (1 - gate) * context


class InnerPredictions(nn.Module):
    """Intermediate CTC of one encoder: a norm for each layer that predicts, and one adapter for all of them.

    Paper: encoding goes on from the *normalised* state (`from_normalised`), not from the residual stream.
    """

    def __init__(
        self,
        layers: list[int],
        *,
        kind: AdapterKind,
        from_normalised: bool,
        width: int,
        vocab_size: int,
        pad_id: int,
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({str(layer): nn.LayerNorm(width) for layer in layers})
        self.adapter = PredictionAdapter(kind=kind, width=width, vocab_size=vocab_size, pad_id=pad_id)
        self.from_normalised = from_normalised

    def forward(
        self, layer: int, x_BSD: Tensor, head: CtcHead, oracle: Oracle | None = None
    ) -> tuple[Tensor, Tensor]:
        """The state after `layer` with its prediction, and the prediction's logits."""
        normalised = self.norms[str(layer)](x_BSD)
        logits = head(normalised)
        if self.adapter.kind == "none":  # plain intermediate CTC only reads
            return x_BSD, logits
        return self.adapter(normalised if self.from_normalised else x_BSD, logits, oracle), logits


def token_table(vocab_size: int, width: int, pad_id: int) -> Tensor:
    """A table [V, D] from N(0, 1/D), with zeros in the row of padding."""
    table = torch.randn(vocab_size, width) / math.sqrt(width)
    table[pad_id] = 0.0
    return table
