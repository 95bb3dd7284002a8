"""Decoder layers that hand attention scores upwards: producers compute them in full, shared layers adjust them.

    S_align = f_l(S_{l-1})       S_delta = s_r rope(x W_Q^LR) rope(x W_K^LR)^T       S_l = S_align + S_delta

A shared layer keeps W_V and W_O of the model it was made from and has neither W_Q nor W_K. Scores are an argument
and a result, never a side effect of the cache, so sharing works without a cache and under checkpointing too.

Shapes: B sequences, Q queries, T visible keys, H heads, G key or value heads, D head size, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from eagleray.models.lisa.alignment import HeadAlignment
from eagleray.models.lisa.kernels import (
    add_low_rank,
    attention_weights,
    full_scores,
    row_statistic,
    weighted_values,
)
from eagleray.models.lisa.spec import LisaSpec


@dataclass(frozen=True)
class Step:
    """What all layers of one forward pass have in common."""

    position_embeddings: tuple[Tensor, Tensor]
    """Cosines and sines [B, Q, D] of the model's rotary code."""
    position_ids: Tensor
    """[B, Q]."""
    mask: Tensor | None
    """[B, 1, Q, T], true where a query sees a key; None: all do."""
    cache: Cache | None = None
    visible: int | None = None
    """How many keys of a static cache exist so far; None: all of them."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all visible positions."""
        if self.cache is None:
            return k, v
        k, v = self.cache.update(k, v, layer)
        return (k, v) if self.visible is None else (k[:, :, : self.visible], v[:, :, : self.visible])


def queries_and_keys(
    attention: Any, x: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Rotated queries [B, H, Q, D] and keys [B, G, Q, D] of a full attention module of transformers."""
    shape = (*x.shape[:-1], -1, attention.head_dim)
    q, k = attention.q_proj(x).view(shape), attention.k_proj(x).view(shape)
    if hasattr(attention, "q_norm"):  # Qwen3
        q, k = attention.q_norm(q), attention.k_norm(k)
    return apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)


class _ScoreAttention(nn.Module):
    """What producers and shared layers have in common: values, output, softmax."""

    def __init__(self, base: Any, spec: LisaSpec) -> None:
        super().__init__()
        self.layer_idx: int = base.layer_idx
        self.head_dim: int = base.head_dim
        self.stage, self.score_dtype, self.dropout = spec.stage, spec.score_dtype, base.attention_dropout
        self.v_proj, self.o_proj = base.v_proj, base.o_proj

    def _values(self, x: Tensor) -> Tensor:
        return self.v_proj(x).view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def _precise(self, scores: Tensor) -> Tensor:
        precise = self.score_dtype == "float32" or (self.score_dtype == "auto" and scores.shape[2] == 1)
        return scores.to(torch.promote_types(scores.dtype, torch.float32)) if precise else scores

    def _output(self, weights: Tensor, v: Tensor) -> Tensor:
        return self.o_proj(weighted_values(F.dropout(weights, self.dropout, self.training), v))


class ProducerAttention(_ScoreAttention):
    """Full attention whose scores are exposed to the layer above."""

    def __init__(self, base: Any, spec: LisaSpec) -> None:
        super().__init__(base, spec)
        self.scaling: float = base.scaling
        self.q_proj, self.k_proj = base.q_proj, base.k_proj
        if hasattr(base, "q_norm"):
            self.q_norm, self.k_norm = base.q_norm, base.k_norm

    def forward(self, x: Tensor, scores: Tensor | None, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Output [B, Q, width], weights and scores [B, H, Q, T]; the scores from below are not used."""
        q, k = queries_and_keys(self, x, step.position_embeddings)
        k, v = step.update(self.layer_idx, k, self._values(x))
        scores = self._precise(full_scores(q, k, self.scaling))
        weights = attention_weights(scores, step.mask)
        return self._output(weights, v), weights, weights if self.stage == "weights" else scores


class SharedAttention(_ScoreAttention):
    """Attention on the scores of the layer below, aligned by f and corrected by low-rank queries and keys."""

    def __init__(self, base: Any, spec: LisaSpec, *, rope_theta: float) -> None:
        super().__init__(base, spec)
        index = spec.shared_layers.index(self.layer_idx)
        heads, width = base.q_proj.out_features // base.head_dim, base.q_proj.in_features
        assert spec.key_heads is not None, "the specification is resolved"
        self.rank, self.key_heads = spec.ranks[index], spec.key_heads
        self.rope, self.row_center, self.rope_theta = spec.rope, spec.row_center, rope_theta
        self.scaling = spec.scale_of(self.layer_idx, base.head_dim)
        self.pairs = None if spec.rope_pairs is None else spec.rope_pairs[index]
        # Not a buffer: models are built on the meta device, which would leave it without numbers.
        self._pair_index: Tensor | None = None
        bias = base.q_proj.bias is not None
        if self.rank:
            self.q_lr = nn.Linear(width, heads * self.rank, bias=bias)
            self.k_lr = nn.Linear(width, self.key_heads * self.rank, bias=bias)
        self.align = HeadAlignment(spec.align, heads=heads, width=spec.width(heads))

    def forward(self, x: Tensor, scores: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Output [B, Q, width], weights and scores [B, H, Q, T] of this layer from the scores of its source.

        Raises:
            ValueError: The cache of this layer holds another number of keys than that of the source.
        """
        if self.rank:
            q, k = self.low_rank(x, step)
            k, v = step.update(self.layer_idx, k, self._values(x))
        else:
            v = self._values(x)
            k, v = step.update(self.layer_idx, v[..., :0], v)
            q = k
        if v.shape[2] != scores.shape[3]:
            raise ValueError(
                f"Layer {self.layer_idx} sees {v.shape[2]} keys, the layer whose scores it shares {scores.shape[3]}. "
                "Something dropped keys from the cache of one of them; use a cache that keeps all."
            )
        aligned = self.align_scores(scores, step.mask)
        if self.stage == "weights":
            if step.mask is not None:
                aligned = aligned.masked_fill(~step.mask, 0.0)
            return self._output(aligned, v), aligned, aligned
        if self.rank:
            own = aligned is not scores and not torch.is_grad_enabled()
            aligned = add_low_rank(aligned, q, k, self.scaling, in_place=own)
        weights = attention_weights(aligned, step.mask)
        return self._output(weights, v), weights, aligned

    def align_scores(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """S_align = f(S), S without the statistic that `row_center` names."""
        if self.row_center != "none":
            scores = scores - row_statistic(scores, mask, self.row_center)
        return self.align(scores)

    def low_rank(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Rotated low-rank queries [B, H, Q, R] and keys [B, G_r, Q, R]."""
        shape = (*x.shape[:-1], -1, self.rank)
        q, k = self.q_lr(x).view(shape), self.k_lr(x).view(shape)
        if self.rope != "none":
            cos, sin = self._rotation(step)
            k = _rotate(k, cos, sin)
            if self.rope == "pairs":  # a query head turns as the key head of its group does
                repeats = q.shape[2] // self.key_heads
                cos, sin = cos.repeat_interleave(repeats, 2), sin.repeat_interleave(repeats, 2)
            q = _rotate(q, cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    def _rotation(self, step: Step) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, Q, G_r or 1, R / 2]."""
        cos, sin = step.position_embeddings
        if self.rope == "pairs":
            if self._pair_index is None or self._pair_index.device != cos.device:
                self._pair_index = torch.tensor(self.pairs, device=cos.device)
            return cos[..., self._pair_index], sin[..., self._pair_index]
        exponents = torch.arange(0, self.rank, 2, device=cos.device, dtype=torch.float32) / self.rank
        angles = step.position_ids[..., None, None].float() * self.rope_theta**-exponents
        return angles.cos().to(cos.dtype), angles.sin().to(sin.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + R/2) of heads [B, Q, heads, R]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class LisaDecoderLayer(nn.Module):
    """A decoder layer whose attention takes and gives scores; norms and MLP are those of the layer it replaces."""

    def __init__(self, base: Any, attention: ProducerAttention | SharedAttention) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = base.mlp
        self.input_layernorm = base.input_layernorm
        self.post_attention_layernorm = base.post_attention_layernorm

    def forward(self, hidden: Tensor, scores: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        """Hidden states [B, Q, width] and the scores that the layer above gets."""
        attended, _, handed_on = self.self_attn(self.input_layernorm(hidden), scores, step)
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), handed_on
