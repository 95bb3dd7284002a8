"""Cache layers of shared layers: values and low-rank keys, stored with time as the last axis.

A decode step reads every value once, as a product of one row of weights with all values. With time last both
factors are contiguous along the summed axis, which CPUs stream several times faster than heads of numbers with a
large stride between keys. The axes stand as in any other cache layer (keys [B, G_r, T, R], values [B, G, T, D]);
only the memory behind them is transposed.

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

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.is_initialized and self.keys is not None and self.values is not None:
            key_states = _append(self.keys, key_states)
            value_states = _append(self.values, value_states)
        else:
            self.dtype, self.device = value_states.dtype, value_states.device
            key_states, value_states = _time_last(key_states), _time_last(value_states)
            self.is_initialized = True
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0 if self.values is None else self.values.shape[-2]


class LisaStaticLayer(StaticLayer):
    """Has its full length from the start."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = value_states.dtype, value_states.device
        self.batch_size, self.num_heads = value_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        self.keys, self.values = (
            x.new_zeros((*x.shape[:2], x.shape[-1], self.max_cache_len)).transpose(2, 3)
            for x in (key_states, value_states)
        )
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.is_initialized = True


class LisaStaticSlidingLayer(LisaStaticLayer, StaticSlidingWindowLayer):
    """Has the length of its window from the start."""


def prepare_cache(cache: Cache, *, layers: int, shared_layers: tuple[int, ...]) -> None:
    """Give the shared layers of an empty cache their own classes; a cache that has them is left alone.

    Raises:
        ValueError: The cache is of a kind that sharing does not work with, or another model filled it.
    """
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.extend(DynamicLayer() for _ in range(layers - len(cache.layers)))
    if len(cache.layers) < layers:
        raise ValueError(
            f"The cache {type(cache).__name__} has {len(cache.layers)} layers, the model {layers}; "
            "make it from the config of this model."
        )
    for i in shared_layers:
        cache.layers[i] = _own(cache.layers[i], i)


def cache_bytes(cache: Cache) -> int:
    """Bytes of all keys and values that a cache holds."""
    layers: list[Any] = list(cache.layers)
    tensors = [t for layer in layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)


def _own(layer: Any, index: int) -> Any:
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
        return LisaStaticLayer(max_cache_len=layer.max_cache_len)
    if type(layer) is StaticSlidingWindowLayer:
        return LisaStaticSlidingLayer(max_cache_len=layer.max_cache_len, sliding_window=layer.max_cache_len)
    return LisaDynamicLayer()


def _time_last(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def _append(old: Tensor, new: Tensor) -> Tensor:
    return torch.cat([old.transpose(2, 3), new.transpose(2, 3)], -1).transpose(2, 3)
