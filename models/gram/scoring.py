"""Logits of the two preference labels, computed where they are needed and nowhere else.

The judge reads one position and two vocabulary rows of a prompt. `label_logits` computes just these, and in the last
layer that position alone, with gradients, so the same function serves training and evaluation; `label_logits_shared`
computes a prefix that many prompts have in common once and keeps its keys and values.

Shapes: B prompts, T tokens, V vocabulary, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from eagleray.models.backbone.last_layer import last_layer_at
from eagleray.models.gram.batching import Ids, pad_right, token_batches

LabelSpace = Literal["two_way", "full_vocab"]

_IGNORES_POSITIONS = (
    "{} returned logits of shape {} when asked for some positions only: it does not honour `logits_to_keep`. "
    "Use a causal language model whose `forward` takes that argument as a tensor."
)


def label_logits(
    model: nn.Module,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    label_ids: tuple[int, int],
    *,
    label_space: LabelSpace = "two_way",
) -> Tensor:
    """Logits for the token after the last one of each prompt, in float32 (float64 for a float64 model).

    Equal, up to rounding, to gathering them from the full `[B, T, V]` logits, which are never made.

    Args:
        model: A causal language model of transformers, also wrapped by peft or DeepSpeed.
        input_ids_BT: Prompts, padded on either side.
        attention_mask_BT: 1 at tokens, 0 at padding.
        label_ids: Token ids of the labels A and B.
        label_space: `two_way` computes the two label logits, `full_vocab` those of the whole vocabulary.

    Returns:
        Logits [B, 2] in the order of `label_ids`, or [B, V].
    """
    mask_BT = attention_mask_BT.long()
    last_B1 = (mask_BT * torch.arange(mask_BT.shape[1], device=mask_BT.device)).argmax(1, keepdim=True)
    inputs = position_arguments(mask_BT)
    return _last_logits(
        model, label_ids, label_space, last_B1, mask_BT=mask_BT, input_ids=input_ids_BT, **inputs
    )


def label_logits_shared(
    model: nn.Module,
    prefix: Ids,
    suffixes: Sequence[Ids],
    label_ids: tuple[int, int],
    *,
    max_batch_tokens: int = 16384,
) -> Tensor:
    """`label_logits` (two-way) of the prompts `prefix + suffix`, computing the prefix once; for evaluation.

    Args:
        model: A causal language model for which `can_share_prefix` holds.
        prefix: Tokens that all prompts start with; at least one.
        suffixes: What follows in each prompt; at least one token each.
        label_ids: Token ids of the labels A and B.
        max_batch_tokens: Budget of one forward pass; each row counts with its prefix, whose cache it copies.

    Returns:
        Logits [len(suffixes), 2], in the order of `suffixes`.
    """
    if not can_share_prefix(model):
        raise ValueError(
            f"{type(unwrapped(model)).__name__} keeps more than keys and values of a prefix (a recurrent "
            "state, for example), which cannot be reused here. Use `label_logits` on the whole prompts."
        )
    device = model_device(model)
    prefix_1T = torch.tensor([list(prefix)], device=device)
    end_1 = torch.tensor([len(prefix) - 1], device=device)
    with _label_rows_only(model, label_ids), last_layer_at(model, end_1):
        prefix_cache = model(
            input_ids=prefix_1T, past_key_values=_empty_cache(model), use_cache=True, logits_to_keep=1
        ).past_key_values
    order: list[int] = []
    chunks: list[Tensor] = []
    for batch in token_batches(list(map(len, suffixes)), max_tokens=max_batch_tokens, overhead=len(prefix)):
        ids_BT, mask_BT = pad_right([suffixes[i] for i in batch])
        last_B1 = mask_BT.sum(1, keepdim=True) - 1
        # Padding on the right is behind every token that counts: causal attention hides it without a mask.
        logits_B2 = _last_logits(
            model,
            label_ids,
            "two_way",
            last_B1.to(device),
            input_ids=ids_BT.to(device),
            past_key_values=_repeated(prefix_cache, len(batch)),
            use_cache=True,
        )
        order.extend(batch)
        chunks.append(logits_B2)
    logits_N2 = torch.cat(chunks)
    return logits_N2[torch.tensor(order, device=logits_N2.device).argsort()]


def can_share_prefix(model: nn.Module) -> bool:
    """Whether the model keeps plain keys and values, which can be reused (a recurrent state cannot)."""
    return all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in _empty_cache(model).layers
    )


def model_device(model: nn.Module) -> torch.device:
    """Device of the model's inputs."""
    return unwrapped(model).device  # type: ignore[return-value]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a DeepSpeed engine or DistributedDataParallel, whose attributes mean other things."""
    return getattr(model, "module", model)


def position_arguments(attention_mask_BT: Tensor) -> dict[str, Any]:
    """Mask and positions as the model needs them.

    Padding on the right needs neither: causal attention hides it and positions count from zero anyway.
    Leaving the mask out lets the attention kernel use its causal path instead of a [B, 1, T, T] mask.
    """
    if bool(attention_mask_BT[:, 0].all() & (attention_mask_BT.diff(dim=1) <= 0).all()):
        return {"use_cache": False}
    positions_BT = (attention_mask_BT.cumsum(1) - 1).clamp(min=0)
    return {"attention_mask": attention_mask_BT, "position_ids": positions_BT, "use_cache": False}


def _last_logits(
    model: nn.Module,
    label_ids: tuple[int, int],
    label_space: LabelSpace,
    last_B1: Tensor,
    *,
    mask_BT: Tensor | None = None,
    **inputs: Any,
) -> Tensor:
    if label_space not in ("two_way", "full_vocab"):
        raise ValueError(f"`label_space` is {label_space!r}; it must be 'two_way' or 'full_vocab'.")
    two_way = label_space == "two_way"
    rows = _label_rows_only(model, label_ids) if two_way else nullcontext(True)
    with rows as narrowed, last_layer_at(model, last_B1[:, 0], mask_BT) as at_last:
        logits_B1K = model(**inputs, logits_to_keep=1 if at_last else last_B1).logits
    if not narrowed:
        logits_B1K = logits_B1K[..., list(label_ids)]
    if logits_B1K.shape[:2] != last_B1.shape:
        raise ValueError(_IGNORES_POSITIONS.format(type(model).__name__, tuple(logits_B1K.shape)))
    return logits_B1K[:, 0].to(torch.promote_types(logits_B1K.dtype, torch.float32))


@contextmanager
def _label_rows_only(model: nn.Module, label_ids: tuple[int, int]) -> Iterator[bool]:
    """While active, the LM head computes only the two label rows; yields whether it does.

    The head's `forward` is swapped rather than its weight read from outside, because calling the module is
    what makes its hooks run: under ZeRO-3 they gather the weight, which is an empty tensor at any other time.
    And the model's own `forward` still does what it does to logits (scaling, soft capping). A head that is
    not a plain linear layer (LoRA on the head, quantised, offloaded by accelerate) computes its rows as it
    always does.
    """
    head = unwrapped(model).get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear or "forward" in vars(head):
        yield False
        return

    def label_rows(hidden_BTD: Tensor) -> Tensor:
        rows = list(label_ids)
        return F.linear(hidden_BTD, head.weight[rows], None if head.bias is None else head.bias[rows])

    head.forward = label_rows  # type: ignore[method-assign]
    try:
        yield True
    finally:
        del head.forward


def _empty_cache(model: nn.Module) -> DynamicCache:
    return DynamicCache(config=unwrapped(model).config)  # type: ignore[arg-type]


def _repeated(cache: DynamicCache, batch_size: int) -> DynamicCache:
    """A cache of `batch_size` rows that starts as the single row of `cache` and leaves it untouched.

    Layers grow by concatenation into new tensors, so a shallow copy with expanded tensors is enough.
    """
    repeated = copy.copy(cache)
    repeated.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in repeated.layers:
        assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        layer.keys = layer.keys.expand(batch_size, -1, -1, -1)
        layer.values = layer.values.expand(batch_size, -1, -1, -1)
    return repeated
