"""Looking into a full model: its scores layer by layer, and what happens when a layer gets other ones.

`observing` hooks into the attention modules of an unconverted Llama, Qwen2, Qwen3 or Mistral, with whatever kernel
it runs. Layers are visited in order and their scores are dropped as soon as no later layer asks for them, so one
pass over a long text never holds more than two score tensors.

Shapes: B sequences, T tokens, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eagleray.models.lisa.config import layer_kinds
from eagleray.models.lisa.kernels import attention_weights, full_scores, weighted_values
from eagleray.models.lisa.layers import Step, queries_and_keys
from eagleray.models.lisa.masks import explicit_mask

SUPPORTED = ("llama", "qwen2", "qwen3", "mistral")
"""`model_type` of models that can be observed and converted."""


@dataclass(frozen=True)
class LayerView:
    """One layer's attention in one forward pass."""

    index: int
    attention: Any
    """The attention module of transformers."""
    x: Tensor
    """Its normalised input [B, T, width]."""
    q: Tensor
    """Rotated queries [B, H, T, D]."""
    k: Tensor
    """Rotated keys [B, G, T, D]."""
    scores: Tensor
    """Scaled scores [B, H, T, T], unmasked."""
    below: Tensor | None
    """Scores of the source layer, or None if it has none."""
    step: Step

    @property
    def mask(self) -> Tensor:
        """[B, 1, T, T], true where a query sees a key."""
        if self.step.mask is None:
            return self.scores.new_ones((len(self.scores), 1, *self.scores.shape[-2:]), dtype=torch.bool)
        return self.step.mask

    def output(self, scores: Tensor) -> Tensor:
        """Output [B, T, width] of this attention with other scores in place of its own."""
        v = self.attention.v_proj(self.x).view(*self.x.shape[:2], -1, self.attention.head_dim).transpose(1, 2)
        return self.attention.o_proj(weighted_values(attention_weights(scores, self.step.mask), v))


Visit = Callable[[LayerView], Tensor | None]
"""Sees a layer; may return scores that it is to use instead of its own."""


def check_supported(model: Any) -> None:
    """Raises:
    ValueError: The model is of another architecture, or quantised.
    """
    kind = getattr(model.config, "model_type", None)
    if kind not in SUPPORTED:
        raise ValueError(
            f"The model is a {kind!r}; attention scores can be shared in {', '.join(SUPPORTED)} models."
        )
    if (
        getattr(model, "is_quantized", False)
        or getattr(model.config, "quantization_config", None) is not None
    ):
        raise ValueError(
            "The model is quantised; its weights can't be sliced or hooked into. Load it in full precision, convert "
            "it, and quantise the result."
        )


def visible_rows(attention_mask: Tensor | None, like: Tensor) -> Tensor:
    """[B, T], true for queries that are no padding; `like` has sizes [B, T, ...]."""
    if attention_mask is None:
        return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
    return attention_mask.bool()


@contextmanager
def observing(
    model: Any,
    visit: Visit,
    *,
    layers: Mapping[int, int | None] | None = None,
    attention_mask: Tensor | None = None,
) -> Iterator[None]:
    """Forward passes of `model` inside the block call `visit` for each chosen layer.

    Args:
        model: A supported model, or its trunk.
        visit: Called in the order of the layers.
        layers: Layers to look at, each with the layer whose scores it gets as `below`; default: all, with the
            preceding one.
        attention_mask: [B, T] of the passes to come; kernels may not hand it to the layers.

    Raises:
        ValueError: The model is not supported.
    """
    check_supported(model)
    trunk = model.base_model
    if layers is None:
        layers = {i: i - 1 if i else None for i in range(len(trunk.layers))}
    last_use: dict[int, int] = {}
    for i, source in sorted(layers.items()):
        if source is not None:
            last_use[source] = i
    kept: dict[int, Tensor] = {}
    kinds = layer_kinds(model.config)

    def hook(i: int, attention: Any, kwargs: dict[str, Any], output: Any) -> Any:
        x = kwargs["hidden_states"]
        positions = torch.arange(x.shape[1], device=x.device)[None]
        mask = explicit_mask(
            model.config, kinds[i], inputs_embeds=x, attention_mask=attention_mask, position_ids=positions
        )
        step = Step(kwargs["position_embeddings"], positions, mask)
        q, k = queries_and_keys(attention, x, step.position_embeddings)
        scores = full_scores(q, k, attention.scaling)
        replaced = None
        if i in layers:
            source = layers[i]
            below = None if source is None else kept[source]
            replaced = visit(LayerView(i, attention, x, q, k, scores, below, step))
        for done in [s for s in kept if last_use[s] <= i]:
            del kept[done]
        if i in last_use:
            kept[i] = scores if replaced is None else replaced
        if replaced is None:
            return None
        view = LayerView(i, attention, x, q, k, scores, None, step)
        return (view.output(replaced), None)

    handles = [
        trunk.layers[i].self_attn.register_forward_hook(
            lambda module, args, kwargs, output, i=i: hook(i, module, kwargs, output), with_kwargs=True
        )
        for i in sorted({*layers, *last_use})
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
