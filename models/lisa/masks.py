"""Masks of layers that need them as booleans, whatever kernel the model is set to."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
"""Kind of a layer -> the function of transformers that makes its mask."""


def explicit_mask(
    config: Any,
    kind: str,
    *,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    past_key_values: Cache | None = None,
    visible: int | None = None,
) -> Tensor | None:
    """Mask [B, 1, Q, T], true where a query sees a key; None where a single query sees every key.

    Args:
        config: Of the model.
        kind: A key of `MASKS`.
        inputs_embeds: [B, Q, width]; only sizes, device and dtype count.
        attention_mask: [B, T] or, prepared, [B, 1, Q, T].
        position_ids: [B, Q] or [1, Q].
        past_key_values: The cache, not yet updated.
        visible: Keys beyond these do not exist yet (static caches).
    """
    config = copy.copy(config)
    config._attn_implementation = "sdpa"  # the one for which masks are boolean
    mask = MASKS[kind](
        config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
        allow_is_causal_skip=False,
    )
    assert mask is not None, "leaving a causal mask out is not allowed above"
    mask = mask[..., :visible]
    if mask.dtype != torch.bool:
        mask = mask > torch.finfo(mask.dtype).min / 2
    return None if mask.shape[-2] == 1 and bool(mask.all()) else mask
