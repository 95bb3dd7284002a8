"""Attention of the encoders and the decoder: plain, and with relative positions.

Both run through `scaled_dot_product_attention`, so a GPU takes its fused kernels and softmax accumulates in float32.
Queries, keys and values of one input are one projection.

Shapes: B clips, S positions, K positions attended to, H heads, D width, d width of a head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

XAVIER_GAIN = 1 / math.sqrt(2)


class KeyValue(NamedTuple):
    """Keys and values [B, H, K, d], computed once and attended to often."""

    key: Tensor
    value: Tensor


class _OneInputAttention(nn.Module):
    """Projections of one input to queries, keys and values, and of the result."""

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def project(self, x_BSD: Tensor) -> tuple[Tensor, KeyValue]:
        """Queries, and keys with values, of `x`."""
        query, key, value = split_heads(self.query_key_value(x_BSD), 3, self.heads)
        return query, KeyValue(key, value)

    def attend(self, query: Tensor, memory: KeyValue, mask: Tensor | None, *, causal: bool = False) -> Tensor:
        """Output [B, S, D] of queries over keys and values; `mask` is true where attention is allowed."""
        rate = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            query, *memory, attn_mask=mask, dropout_p=rate, is_causal=causal
        )
        return self.output(merge_heads(mixed))


class SelfAttention(_OneInputAttention):
    """Multi-head self-attention without positions; a decoder keeps what `project` gives for later steps."""

    def forward(self, x_BSD: Tensor, mask: Tensor | None, *, causal: bool = False) -> Tensor:
        query, memory = self.project(x_BSD)
        return self.attend(query, memory, mask, causal=causal)


class CrossAttention(nn.Module):
    """Multi-head attention of one sequence to another."""

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def memory(self, m_BKD: Tensor) -> KeyValue:
        """Keys and values of what is attended to."""
        return KeyValue(*split_heads(self.key_value(m_BKD), 2, self.heads))

    def attend(self, x_BSD: Tensor, memory: KeyValue, mask: Tensor | None) -> Tensor:
        """Output [B, S, D]; `mask` [B, 1, S or 1, K] is true where attention is allowed."""
        (query,) = split_heads(self.query(x_BSD), 1, self.heads)
        rate = self.dropout if self.training else 0.0
        return self.output(
            merge_heads(F.scaled_dot_product_attention(query, *memory, attn_mask=mask, dropout_p=rate))
        )

    def forward(self, x_BSD: Tensor, m_BKD: Tensor, mask: Tensor | None) -> Tensor:
        return self.attend(x_BSD, self.memory(m_BKD), mask)


class RelativeSelfAttention(_OneInputAttention):
    """Self-attention in the form of Transformer-XL (spec 4.3).

    score_ij = [(q_i + u)·k_j + (q_i + v)·(W_p r_{i−j})] / √d, with r sinusoidal.
    """

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__(width=width, heads=heads, dropout=dropout)
        self.position = nn.Linear(width, width, bias=False)
        self.content_bias = nn.Parameter(torch.empty(heads, width // heads))
        self.position_bias = nn.Parameter(torch.empty(heads, width // heads))
        nn.init.xavier_uniform_(self.content_bias)
        nn.init.xavier_uniform_(self.position_bias)

    def forward(self, x_BSD: Tensor, mask: Tensor | None, *, offsets_PD: Tensor) -> Tensor:
        """Attend with the codes [2S − 1, D] of `relative_offsets`; `mask` [B, 1, 1, S] is true for real frames."""
        query, memory = self.project(x_BSD)
        (codes,) = split_heads(self.position(offsets_PD)[None], 1, self.heads)
        scale = query.shape[-1] ** -0.5
        # Scaling the smaller factor saves a pass over the S x S scores.
        by_offset = ((query + self.position_bias[:, None]) * scale) @ codes.transpose(2, 3)
        scores = _pick_offsets(by_offset)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return self.attend(query + self.content_bias[:, None], memory, scores)


def relative_offsets(size: int, like: Tensor) -> Tensor:
    """Sinusoidal codes [2·size − 1, D] of the offsets size − 1, ..., −(size − 1), in the type of `like` [..., D]."""
    offsets = torch.arange(size - 1, -size, -1, device=like.device, dtype=torch.float32)
    return sinusoids(offsets, like.shape[-1]).to(like.dtype)


def sinusoids(positions_P: Tensor, width: int) -> Tensor:
    """Sinusoidal codes [P, width] of positions, sine and cosine in turn."""
    steps = torch.arange(0, width, 2, device=positions_P.device, dtype=torch.float32)
    angles = positions_P[:, None] * torch.exp(steps * (-math.log(10_000.0) / width))
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """[B, S, parts·D] as `parts` tensors [B, H, S, d]."""
    batch, size, _ = x.shape
    return x.view(batch, size, parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def merge_heads(x_BHSd: Tensor) -> Tensor:
    """[B, H, S, d] as [B, S, D]."""
    return x_BHSd.transpose(1, 2).flatten(2)


def _pick_offsets(by_offset: Tensor) -> Tensor:
    """From scores by offset [B, H, S, 2S − 1] those of pairs, [B, H, S, S]: entry (i, j) is column S − 1 − i + j.

    Row i starts one column before row i − 1, so in rows that are one shorter its entries stand at the front.
    """
    size, columns = by_offset.shape[2:]
    if size == 1:
        return by_offset
    shifted = by_offset.flatten(2)[..., size - 1 : size - 1 + size * (columns - 1)]
    return shifted.unflatten(2, (size, columns - 1))[..., :size]
