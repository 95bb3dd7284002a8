"""The arithmetic of one attention layer on explicit scores, laid out so that each product reads its cache once.

    S_full = q k^T / sqrt(d)      S = S_align + s_r q_r k_r^T      y = softmax(S + mask) v

Every product is one batched matrix product over (sequence, key head), with the query heads of a group and the
queries side by side as rows: keys and values are never repeated. Scores stay unmasked, because f of the next layer
reads them; the mask enters in the softmax only.

Shapes: B sequences, H query heads, G key or value heads (a divisor of H), Q queries, T visible keys, D head size.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPED = "lisa_grouped"
"""Name under which `grouped_attention` is an `attn_implementation` of transformers."""
_CPU = Path("/proc/cpuinfo")
_INTEL = _CPU.is_file() and "GenuineIntel" in _CPU.read_text(encoding="utf-8", errors="replace")
"""Whether the maker of the processor is known to be Intel."""
_VALUES_ON_THE_LEFT = not _INTEL and torch.backends.cpu.get_cpu_capability() == "AVX2"
"""Whether values of several rows are the left factor. MKL was faster so on one AMD processor and slower on one with
AVX-512 (docs/decisions/0007-lisa-time-last-cache.md)."""
_OUTGROWS_CACHES = 4096
"""Keys of a head from which on a decoding step is bound by reading them from memory."""


def keep_time_last(rows: int, device: torch.device) -> bool:
    """Whether values that `rows` query heads have in common are read faster if time is the last axis of their memory.

    Measured on CPUs: one row on all, two to eight where the values are the left factor (`weighted_values`).
    """
    return rows == 1 or (device.type == "cpu" and _VALUES_ON_THE_LEFT)


def full_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scaled scores [B, H, Q, T] of queries [B, H, Q, D] and keys [B, G, T, D]."""
    b, h, queries, d = q.shape
    rows = (q * scale).reshape(b * k.shape[1], -1, d)
    keys = k.flatten(0, 1)
    if rows.shape[1] <= 4 and not q.is_cuda and keys.stride(-1) == 1 and not _INTEL:
        # With few rows MKL streams the keys two to four times faster as the left factor on AMD's processors, and slower on
        # Intel's.
        scores = torch.bmm(keys, rows.transpose(1, 2)).transpose(1, 2)
    else:
        scores = torch.bmm(rows, keys.transpose(1, 2))
    return scores.reshape(b, h, queries, k.shape[2])


def add_low_rank(scores: Tensor, q: Tensor, k: Tensor, scale: float, *, in_place: bool = False) -> Tensor:
    """`scores` [B, H, Q, T] plus scaled products of queries [B, H, Q, R] and keys [B, G, T, R].

    `in_place` adds to `scores` themselves, which must then be nobody else's and without a gradient.
    """
    b, h, queries, visible = scores.shape
    groups = k.shape[1]
    rows = q.reshape(b * groups, -1, q.shape[-1]).to(scores.dtype)
    keys = k.flatten(0, 1).transpose(1, 2).to(scores.dtype)
    grouped = scores.reshape(b * groups, -1, visible)
    total = torch.baddbmm(grouped, rows, keys, alpha=scale, out=grouped if in_place else None)
    return total.view(b, h, queries, visible)


def attention_weights(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the visible keys, in float32 at least; a row without any is uniform, not NaN."""
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))


def weighted_values(weights: Tensor, v: Tensor) -> Tensor:
    """Weights [B, H, Q, T] and values [B, G, T, D] -> outputs [B, Q, H x D]."""
    b, h, queries, visible = weights.shape
    groups = v.shape[1]
    rows, values = weights.reshape(b * groups, -1, visible).to(v.dtype), v.flatten(0, 1)
    few = 1 < rows.shape[1] <= 8 and visible > _OUTGROWS_CACHES
    if few and not v.is_cuda and values.stride(1) == 1 and _VALUES_ON_THE_LEFT:
        out = torch.bmm(values.transpose(1, 2), rows.transpose(1, 2)).transpose(1, 2)
    else:
        out = torch.bmm(rows, values)
    return out.reshape(b, h, queries, -1).transpose(1, 2).reshape(b, queries, -1)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """The same arithmetic in the form of a transformers attention function, for plain layers."""
    scores = full_scores(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = attention_weights(scores, attention_mask)
    out = weighted_values(F.dropout(weights, dropout, module.training), value)
    return out.view(*out.shape[:2], query.shape[1], -1), weights


def row_statistic(scores: Tensor, mask: Tensor | None, kind: str) -> Tensor:
    """Maximum or mean of each row of scores over its visible keys, shape [B, H, Q, 1]; 0 where there are none."""
    if mask is None:
        return scores.amax(-1, keepdim=True) if kind == "max" else scores.mean(-1, keepdim=True)
    seen = mask.sum(-1, keepdim=True)
    if kind == "max":
        largest = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).amax(-1, keepdim=True)
        return largest.masked_fill(seen == 0, 0.0)
    return scores.masked_fill(~mask, 0.0).sum(-1, keepdim=True) / seen.clamp(min=1)
