"""The last decoder layer at one position a row, for models that read one position.

A judge, a reward model and a pair encoder look at a single state of each row. All positions must go through the layers
before the last, whose keys and values the last one attends to; but queries, output projection and MLP of the last layer
are needed at that one position only. With L layers this saves some 0.8/L of a pass, forwards and backwards.

Shapes: B rows, T tokens, P tokens in the cache, D width, H query heads, G key heads, d size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaModel, MistralModel, Qwen2Model, Qwen3Model
from transformers.models.llama.modeling_llama import rotate_half

_BODIES = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)


@contextmanager
def last_layer_at(model: nn.Module, index_B: Tensor, mask_BT: Tensor | None = None) -> Iterator[bool]:
    """While active, the last layer of `model` computes one position of each row; yields whether it does.

    The model's `last_hidden_state` is then [B, 1, D], equal to the rows of the ordinary one up to rounding. It is left as
    it is (and False is yielded) if it is not of a known architecture, or the layer's `forward` has been replaced already. Parts of the layer are called as modules, so that adapters and the hooks of ZeRO-3 work.

    Args:
        model: A causal language model or its body, also inside a wrapper of peft, DeepSpeed or LLaVA.
        index_B: The position of each row that is read, counted in the inputs of this pass.
        mask_BT: 1 at tokens, 0 at padding of this pass; not needed if padding is on the right.
    """
    layer = _last_layer(model)
    if layer is None:
        yield False
        return

    def forward(
        hidden_BTD: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any = None,
        **_: Any,
    ) -> Tensor:
        attention = layer.self_attn
        batch, length, _width = hidden_BTD.shape
        normed_BTD = layer.input_layernorm(hidden_BTD)
        cos, sin = (part.expand(batch, -1, -1) for part in position_embeddings)
        keys_BGTd = _heads(attention, "k", normed_BTD)
        keys_BGTd = _rotated(keys_BGTd, cos, sin)
        values_BGTd = _heads(attention, "v", normed_BTD)
        if past_key_values is not None:
            keys_BGTd, values_BGTd = past_key_values.update(keys_BGTd, values_BGTd, attention.layer_idx)
        queries_BH1d = _rotated(
            _heads(attention, "q", _at(normed_BTD, index_B)), _at(cos, index_B), _at(sin, index_B)
        )
        earlier = keys_BGTd.shape[2] - length
        places_T = torch.arange(keys_BGTd.shape[2], device=index_B.device)
        seen_BT = places_T <= earlier + index_B[:, None]
        if (window := _window(attention)) is not None:
            seen_BT = seen_BT & (places_T > earlier + index_B[:, None] - window)
        if mask_BT is not None:
            seen_BT = seen_BT & F.pad(mask_BT.bool(), (earlier, 0), value=True)
        # The query heads that share a key head stand where other positions would.
        attended = F.scaled_dot_product_attention(
            queries_BH1d.unflatten(1, (keys_BGTd.shape[1], -1)).squeeze(3),
            keys_BGTd,
            values_BGTd,
            attn_mask=seen_BT[:, None, None],
            dropout_p=attention.attention_dropout if layer.training else 0.0,
            scale=attention.scaling,
        )
        out_B1D = _at(hidden_BTD, index_B) + attention.o_proj(attended.flatten(1)[:, None])
        return out_B1D + layer.mlp(layer.post_attention_layernorm(out_B1D))

    layer.forward = forward
    try:
        yield True
    finally:
        del layer.forward


def _last_layer(model: nn.Module) -> Any:
    body: Any = next((module for module in model.modules() if type(module) in _BODIES), None)
    if body is None:
        return None
    layer = body.layers[body.config.num_hidden_layers - 1]
    return None if "forward" in vars(layer) else layer


def _window(attention: Any) -> int | None:
    """Mistral has one window for all layers, in its configuration; the Qwen families one a layer, or none."""
    return getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))


def _at(x_BTD: Tensor, index_B: Tensor) -> Tensor:
    return x_BTD[torch.arange(len(index_B), device=index_B.device), index_B][:, None]


def _heads(attention: Any, name: str, x_BTD: Tensor) -> Tensor:
    """[B, heads, T, d] of one projection, normalised where the architecture does that."""
    heads = getattr(attention, f"{name}_proj")(x_BTD).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{name}_norm", None)
    return (heads if norm is None else norm(heads)).transpose(1, 2)


def _rotated(x_BHTd: Tensor, cos_BTd: Tensor, sin_BTd: Tensor) -> Tensor:
    return x_BHTd * cos_BTd[:, None] + rotate_half(x_BHTd) * sin_BTd[:, None]
