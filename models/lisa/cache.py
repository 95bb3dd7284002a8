"""Cache layers of layers that share scores, where it pays stored with time as the last axis.

A decode step reads every value once, as a product of rows of weights with all values. With one row (as many KV heads
as query heads) CPUs stream values several times faster if time is the last axis; with a group of query heads to a KV
head this depends on the processor (`kernels.keep_time_last`). Low-rank keys are stored in the same way, full keys of
producers as ever. The axes stand as in any other cache layer (keys [B, G_r, T, R], values [B, G, T, D]); only the
memory behind them is transposed.

Two more differences from the classes they extend: the number of key heads may differ from that of value heads,
and keys may have width 0 (rank 0), which must not pass for an empty cache when beams are reordered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from eagleray.models.lisa.kernels import keep_time_last


@dataclass(frozen=True)
class Layout:
    """What decides how keys and values lie in memory."""

    rows: int
    """Query heads of a KV head."""
    low_rank_keys: bool
    """Those of a shared layer."""

    def time_last(self, device: torch.device) -> tuple[bool, bool]:
        """Whether time is the last axis of keys and of values."""
        values = keep_time_last(self.rows, device)
        return values and self.low_rank_keys, values


class LisaDynamicLayer(DynamicLayer):
    """Grows with the text."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.keys, self.values
        if not self.is_initialized or keys is None or values is None:
            self.dtype, self.device = value_states.dtype, value_states.device
            keys, values = key_states[:, :, :0], value_states[:, :, :0]
            self.is_initialized = True
        keys_last, values_last = self.layout.time_last(value_states.device)
        self.keys = _append(keys, key_states, keys_last)
        self.values = _append(values, value_states, values_last)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0 if self.values is None else self.values.shape[-2]


class LisaStaticLayer(StaticLayer):
    """Has its full length from the start."""

    def __init__(self, layout: Layout, **sizes: int) -> None:
        super().__init__(**sizes)
        self.layout = layout

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = value_states.dtype, value_states.device
        self.batch_size, self.num_heads = value_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        keys_last, values_last = self.layout.time_last(self.device)
        self.keys = self._allocate(key_states, keys_last)
        self.values = self._allocate(value_states, values_last)
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.is_initialized = True

    def _allocate(self, like: Tensor, time_last: bool) -> Tensor:
        b, heads, _, width = like.shape
        if not time_last:
            return like.new_zeros((b, heads, self.max_cache_len, width))
        return like.new_zeros((b, heads, width, self.max_cache_len)).transpose(2, 3)


class LisaStaticSlidingLayer(LisaStaticLayer, StaticSlidingWindowLayer):
    """Has the length of its window from the start."""


def prepare_cache(cache: Cache, config: Any, shared_layers: tuple[int, ...]) -> None:
    """Give producers and shared layers of an empty cache their own classes; a cache that has them is left alone.

    Raises:
        ValueError: The cache is of a kind that sharing does not work with, or another model filled it.
    """
    layers = config.num_hidden_layers
    rows = config.num_attention_heads // config.num_key_value_heads
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.extend(DynamicLayer() for _ in range(layers - len(cache.layers)))
    if len(cache.layers) < layers:
        raise ValueError(
            f"The cache {type(cache).__name__} has {len(cache.layers)} layers, the model {layers}; "
            "make it from the config of this model."
        )
    for i in sorted({*shared_layers, *(i - 1 for i in shared_layers)}):
        cache.layers[i] = _own(cache.layers[i], i, Layout(rows, low_rank_keys=i in shared_layers))


def cache_bytes(cache: Cache) -> int:
    """Bytes of all keys and values that a cache holds."""
    layers: list[Any] = list(cache.layers)
    tensors = [t for layer in layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)


def _append(old: Tensor, new: Tensor, time_last: bool) -> Tensor:
    if not time_last:
        return torch.cat([old, new], 2)
    return torch.cat([old.transpose(2, 3), new.transpose(2, 3)], 3).transpose(2, 3)


def _own(layer: Any, index: int, layout: Layout) -> Any:
    """Our cache layer in place of the one that transformers made."""
    if type(layer) in (LisaDynamicLayer, LisaStaticLayer, LisaStaticSlidingLayer, DynamicSlidingWindowLayer):
        return layer
    if type(layer) not in (DynamicLayer, StaticLayer, StaticSlidingWindowLayer):
        raise ValueError(
            f"Layer {index} of the cache is a {type(layer).__name__}; layers that share attention scores work with "
            "dynamic, static and sliding-window caches only. Quantised caches and those that drop or merge keys "
            "break the order of keys that layers have in common."
        )
    if int(layer.get_seq_length()):
        raise ValueError(
            f"Layer {index} of the cache holds full keys, so a model that shares less filled it. Start from an "
            "empty cache."
        )
    if type(layer) is StaticLayer:
        return LisaStaticLayer(layout, max_cache_len=layer.max_cache_len)
    if type(layer) is StaticSlidingWindowLayer:
        window = layer.max_cache_len
        return LisaStaticSlidingLayer(layout, max_cache_len=window, sliding_window=window)
    return LisaDynamicLayer(layout)
