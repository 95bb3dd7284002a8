"""What sharing costs and saves: parameters, cache bytes and arithmetic, exactly (sections 4, 5 and 7 of docs/lisa.md).

D width, H query heads, G KV heads, d head size, r rank, G_r low-rank key heads, T visible keys; a multiply-add is 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eagleray.models.lisa.config import head_dim
from eagleray.models.lisa.spec import LisaSpec


def align_parameters(spec: LisaSpec, heads: int) -> int:
    """|f|: parameters of one head-alignment network."""
    kind, width = spec.align.kind, spec.width(heads)
    linear = heads**2 if kind in ("linear", "linear+ffn") else 0
    hidden = (3 if kind == "glu" else 2) * heads * width
    biases = width + heads if width and spec.align.bias and kind != "glu" else 0
    return linear + hidden + biases


def added_parameters(config: Any, spec: LisaSpec) -> int:
    """Sum over shared layers of D r (H + G_r) + |f| (and biases of the low-rank projections)."""
    heads, key_heads, bias = _sizes(config, spec)
    rows = config.hidden_size + bias
    return sum(rows * rank * (heads + key_heads) + align_parameters(spec, heads) for rank in spec.ranks)


def removed_parameters(config: Any, spec: LisaSpec) -> int:
    """Sum over shared layers of D d (H + G), what W_Q and W_K held (and their biases and norms)."""
    heads, _, bias = _sizes(config, spec)
    size = head_dim(config)
    norms = 2 * size if config.model_type.endswith("qwen3") else 0
    per_layer = (config.hidden_size + bias) * size * (heads + config.num_key_value_heads) + norms
    return len(spec.shared_layers) * per_layer


def cache_bytes_per_token(config: Any, spec: LisaSpec, *, value_bytes: int) -> int:
    """2 G d for a full layer and G d + G_r r for a shared one, over all layers."""
    _, key_heads, _ = _sizes(config, spec)
    values = config.num_key_value_heads * head_dim(config)
    full = (config.num_hidden_layers - len(spec.shared_layers)) * 2 * values
    return value_bytes * (full + sum(values + key_heads * rank for rank in spec.ranks))


def align_flops(spec: LisaSpec, heads: int) -> int:
    """F_f: arithmetic of f at one (query, key) position."""
    kind, width = spec.align.kind, spec.width(heads)
    linear = 2 * heads**2 if kind in ("linear", "linear+ffn") else 0
    return linear + (6 if kind == "glu" else 4) * heads * width + (heads if kind == "ffn_res" else 0)


def full_layer_flops(config: Any, keys: int) -> int:
    """One token through a full attention layer: 2D(2Hd + 2Gd) + 2HdT + 2HdT."""
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, head_dim(config)
    return 4 * config.hidden_size * size * (heads + groups) + 4 * heads * size * keys


def shared_layer_flops(config: Any, spec: LisaSpec, layer: int, keys: int) -> int:
    """One token through a shared one: 2D(Hr + G_r r + Gd + Hd) + 2HrT + F_f T + HT + 2HdT."""
    heads, key_heads, _ = _sizes(config, spec)
    rank, size = spec.rank_of(layer), head_dim(config)
    projections = rank * (heads + key_heads) + size * (config.num_key_value_heads + heads)
    per_key = 2 * heads * rank + align_flops(spec, heads) + heads + 2 * heads * size
    return 2 * config.hidden_size * projections + per_key * keys


def score_share(spec: LisaSpec, layer: int, *, heads: int, size: int) -> float:
    """Arithmetic of a shared layer's scores over that of full ones: (2Hr + F_f + H) / 2Hd per key."""
    return (2 * heads * spec.rank_of(layer) + align_flops(spec, heads) + heads) / (2 * heads * size)


def past_break_even(spec: LisaSpec, *, heads: int, size: int) -> list[tuple[int, float]]:
    """Shared layers whose scores take more arithmetic than full ones, with the share (r + 2m > d for `ffn`)."""
    shares = ((i, score_share(spec, i, heads=heads, size=size)) for i in spec.shared_layers)
    return [(i, share) for i, share in shares if share > 1]


@dataclass(frozen=True)
class DecodeCost:
    """What decoding one token takes, by arithmetic alone."""

    parameters: int
    """All weights."""
    added: int
    """Of these the ones that sharing added, the only ones that need training."""
    cache_bytes: int
    """Keys and values of all sequences of the batch at this context."""
    flops: int
    """Of one token."""
    bytes: int
    """Read and written for one token: weights (once for the batch), cache, and scores handed on (float32)."""


def decode_cost(
    config: Any, spec: LisaSpec, *, parameters: int, batch: int, context: int, value_bytes: int
) -> DecodeCost:
    """Cost of one decoded token at `context` visible keys, of the model and MLP included.

    Args:
        config: Of the model, converted or not.
        spec: What is shared, resolved; `LisaSpec()` for nothing.
        parameters: Weights of the model.
        batch: Sequences decoded together, over which the reading of the weights is spread.
        context: Visible keys.
        value_bytes: Bytes of a weight and of a cached value.
    """
    shared, layers = set(spec.shared_layers), config.num_hidden_layers
    attention = sum(
        shared_layer_flops(config, spec, i, context) if i in shared else full_layer_flops(config, context)
        for i in range(layers)
    )
    mlp = layers * 6 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    read = parameters if config.tie_word_embeddings else parameters - head  # of input embeddings one row
    cache = context * cache_bytes_per_token(config, spec, value_bytes=value_bytes)
    scores = len(shared) * 2 * 4 * config.num_attention_heads * context
    return DecodeCost(
        parameters=parameters,
        added=added_parameters(config, spec),
        cache_bytes=batch * cache,
        flops=attention + mlp + 2 * head,
        bytes=read * value_bytes // batch + cache + scores,
    )


def _sizes(config: Any, spec: LisaSpec) -> tuple[int, int, int]:
    """H, G_r, and 1 if W_Q and W_K have biases."""
    bias = config.model_type.endswith("qwen2") or bool(getattr(config, "attention_bias", False))
    key_heads = config.num_key_value_heads if spec.key_heads is None else spec.key_heads
    return config.num_attention_heads, key_heads, int(bias)
