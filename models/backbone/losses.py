"""Next-token cross-entropy that computes logits only where there is a target.

Shapes: B batch, T tokens, N targets, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def token_losses(model: Any, *, input_ids: Tensor, target_mask: Tensor, **inputs: Tensor) -> Tensor:
    """−log p(u_t | u_<t) of every target token, shape [B, T], 0 where the token is not a target.

    Args:
        model: A causal LM of transformers, bare or wrapped by peft.
        input_ids: [B, T], int64, right-padded: causal attention never looks to the right, so no attention
            mask is needed and the fastest kernel is taken.
        target_mask: [B, T], bool, true where the token is a target; column 0 can't be one.
        inputs: Further arguments of the model, e.g. `pixel_values`.

    The vocabulary projection is the largest matrix product of a small model and its logits the largest
    tensor, so it runs on the N target positions only; log-probabilities are taken in float32 or better.
    """
    predicts_BT = target_mask[:, 1:]
    with head_positions(model, predicts_BT):
        logits_NV = model(input_ids=input_ids, use_cache=False, **inputs).logits[0]
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    losses_N = F.cross_entropy(logits_NV, input_ids[:, 1:][predicts_BT], reduction="none")
    losses_BT = losses_N.new_zeros(input_ids.shape)
    losses_BT[:, 1:] = losses_BT[:, 1:].masked_scatter(predicts_BT, losses_N)
    return losses_BT


@contextlib.contextmanager
def head_positions(model: Any, keep: Tensor) -> Iterator[None]:
    """Inside, the model's output layer sees hidden states [1, N, D] of the kept positions only.

    Args:
        keep: [B, T'], bool with T' <= T; later positions are dropped.

    Only the layer's input is changed, by a pre-hook, so hooks on the layer (ZeRO-3 gathers its weights in
    one) and what the model does to logits afterwards stay as they are.
    """

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTD, *rest = inputs
        return (hidden_BTD[:, : keep.shape[1]][keep][None], *rest)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
