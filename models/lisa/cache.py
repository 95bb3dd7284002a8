"""Cache layers of shared layers: values and low-rank keys, where it pays stored with time as the last axis.

A decode step reads every value once, as a product of rows of weights with all values. With one row (as many KV heads
as query heads) CPUs stream values several times faster if time is the last axis; with a group of query heads to a KV
head they do not. The axes stand as in any other cache layer (keys [B, G_r, T, R], values [B, G, T, D]); only the
memory behind them is transposed.

Two more differences from the classes they extend: the number of key heads may differ from that of value heads,
and keys may have width 0 (rank 0), which must not pass for an empty cache when beams are reordered.
"""

from __future__ import annotations

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


class LisaDynamicLayer(DynamicLayer):
    """Grows with the text."""

    def __init__(self, *, time_last: bool) -> None:
        super().__init__()
        self.time_last = time_last

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.is_initialized and self.keys is not None and self.values is not None:
            key_states = self._append(self.keys, key_states)
            value_states = self._append(self.values, value_states)
        else:
            self.dtype, self.device = value_states.dtype, value_states.device
            key_states, value_states = (self._append(x[:, :, :0], x) for x in (key_states, value_states))
            self.is_initialized = True
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0 if self.values is None else self.values.shape[-2]

    def _append(self, old: Tensor, new: Tensor) -> Tensor:
        if not self.time_last:
            return torch.cat([old, new], 2)
        return torch.cat([old.transpose(2, 3), new.transpose(2, 3)], 3).transpose(2, 3)


class LisaStaticLayer(StaticLayer):
    """Has its full length from the start."""

    def __init__(self, *, time_last: bool, **sizes: int) -> None:
        super().__init__(**sizes)
        self.time_last = time_last

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = value_states.dtype, value_states.device
        self.batch_size, self.num_heads = value_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        self.keys, self.values = (self._allocate(x) for x in (key_states, value_states))
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.is_initialized = True

    def _allocate(self, like: Tensor) -> Tensor:
        b, heads, _, width = like.shape
        if not self.time_last:
            return like.new_zeros((b, heads, self.max_cache_len, width))
        return like.new_zeros((b, heads, width, self.max_cache_len)).transpose(2, 3)


class LisaStaticSlidingLayer(LisaStaticLayer, StaticSlidingWindowLayer):
    """Has the length of its window from the start."""


def prepare_cache(cache: Cache, config: Any, shared_layers: tuple[int, ...]) -> None:
    """Give the shared layers of an empty cache their own classes; a cache that has them is left alone.

    Raises:
        ValueError: The cache is of a kind that sharing does not work with, or another model filled it.
    """
    layers = config.num_hidden_layers
    time_last = config.num_attention_heads == config.num_key_value_heads
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.extend(DynamicLayer() for _ in range(layers - len(cache.layers)))
    if len(cache.layers) < layers:
        raise ValueError(
            f"The cache {type(cache).__name__} has {len(cache.layers)} layers, the model {layers}; "
            "make it from the config of this model."
        )
    for i in shared_layers:
        cache.layers[i] = _own(cache.layers[i], i, time_last=time_last)


def cache_bytes(cache: Cache) -> int:
    """Bytes of all keys and values that a cache holds."""
    layers: list[Any] = list(cache.layers)
    tensors = [t for layer in layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)


def _own(layer: Any, index: int, *, time_last: bool) -> Any:
    """The cache layer of a shared layer in place of the one that transformers made."""
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
        return LisaStaticLayer(time_last=time_last, max_cache_len=layer.max_cache_len)
    if type(layer) is StaticSlidingWindowLayer:
        window = layer.max_cache_len
        return LisaStaticSlidingLayer(time_last=time_last, max_cache_len=window, sliding_window=window)
    return LisaDynamicLayer(time_last=time_last)
