"""The stack of layers of every architecture, with attention scores threaded through it.

`LisaTrunk.forward` is the loop of the parent classes. What a layer does depends on its role: plain layers run
exactly the parent's code and kernel; a chain from a producer to its last sharing layer passes scores [B, H, Q, T]
along and is checkpointed as one piece, so that no score tensor outlives it. A prompt whose scores would be large
goes through the layers in pieces, which changes memory and nothing else.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from eagleray.models.lisa.alignment import HeadAlignment
from eagleray.models.lisa.cache import prepare_cache
from eagleray.models.lisa.config import layer_kinds
from eagleray.models.lisa.kernels import GROUPED
from eagleray.models.lisa.layers import LisaDecoderLayer, ProducerAttention, SharedAttention, Step
from eagleray.models.lisa.masks import MASKS, explicit_mask
from eagleray.models.lisa.spec import LisaSpec

KERNELS = ("eager", "sdpa", GROUPED)
"""Values of `attn_implementation`; they concern plain layers only, the others need their scores."""


class LisaPreTrained(PreTrainedModel):
    """What every model below tells transformers."""

    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = False
    _no_split_modules = ["LisaDecoderLayer"]  # noqa: RUF012 - transformers' convention

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        if attn_implementation not in (None, *KERNELS):
            raise ValueError(
                f"`attn_implementation` is {attn_implementation!r}; models with shared attention scores support "
                f"{', '.join(KERNELS)}. Fused and paged kernels do not give out the scores that layers share."
            )
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, HeadAlignment):
            module.reset()
        else:
            super()._init_weights(module)


class LisaTrunk(LisaPreTrained):
    """The stack of layers. Used before a `...Model` class of transformers in the list of bases."""

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    rotary_emb: nn.Module
    gradient_checkpointing: bool

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        _check_signature(self.layers[0])
        self.lisa = LisaSpec.from_dict(config.lisa_attention)
        theta = config.rope_parameters["rope_theta"]
        for i, role in enumerate(self.lisa.roles(len(self.layers))):
            if role != "plain":
                base: Any = self.layers[i]
                attention = (
                    ProducerAttention(base.self_attn, self.lisa)
                    if role == "producer"
                    else SharedAttention(base.self_attn, self.lisa, rope_theta=theta)
                )
                self.layers[i] = LisaDecoderLayer(base, attention)
        self._chains = self.lisa.chains(len(self.layers))
        self._kinds = layer_kinds(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As the parent's; `attention_mask` is [B, T] or, prepared, [B, 1, Q, T].

        Raises:
            ValueError: A cache of an unsupported kind, or one together with gradient checkpointing.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either `input_ids` or `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = cast(Tensor, self.embed_tokens(input_ids))
        cache = self._cache(past_key_values, bool(use_cache))
        seen = int(cache.get_seq_length()) if cache is not None else 0
        length = inputs_embeds.shape[1]
        if position_ids is None:
            position_ids = torch.arange(seen, seen + length, device=inputs_embeds.device)[None]
        piece = self._piece(inputs_embeds, seen, cache, attention_mask, kwargs)
        hidden = torch.cat(
            [
                self._layers(
                    inputs_embeds[:, i : i + piece],
                    attention_mask
                    if attention_mask is None or i + piece >= length
                    else attention_mask[:, : seen + i + piece],
                    position_ids[:, i : i + piece],
                    cache,
                    kwargs,
                )
                for i in range(0, length, piece)
            ],
            1,
        )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden), past_key_values=cache if use_cache else None
        )

    def _cache(self, cache: Cache | None, use_cache: bool) -> Cache | None:
        if self.gradient_checkpointing and self.training and cache is not None:
            raise ValueError(
                "A cache can't be used with gradient checkpointing: the backward pass would write every key a "
                "second time. Leave `past_key_values` out, or call `model.activation_checkpointing_disable()`."
            )
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        if cache is not None:
            prepare_cache(cache, self.config, self.lisa.shared_layers)
        return cache

    def _piece(
        self, embeds: Tensor, seen: int, cache: Cache | None, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> int:
        """Queries that go through the layers at once, so that one layer's scores stay within the budget."""
        length = max(1, embeds.shape[1])
        records = any(
            kwargs.get(name, getattr(self.config, name, False))
            for name in ("output_hidden_states", "output_attentions")
        )
        prepared = mask is not None and mask.ndim != 2
        budget = self.lisa.score_budget * 2**20
        if (
            not (budget and self.lisa.shared_layers)
            or cache is None
            or torch.is_grad_enabled()
            or records
            or prepared
        ):
            return length
        size = (
            4
            if embeds.dtype == torch.float32 or self.lisa.score_dtype == "float32"
            else embeds.element_size()
        )
        row = len(embeds) * self.config.num_attention_heads * (seen + length) * size
        return min(length, max(1, budget // row))

    def _layers(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        position_ids: Tensor,
        cache: Cache | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        visible = _visible(cache, hidden.shape[1])
        inputs = {
            "inputs_embeds": hidden,
            "attention_mask": mask,
            "past_key_values": cache,
            "position_ids": position_ids,
        }
        rotary = self.rotary_emb(hidden, position_ids=position_ids)
        plain = {
            "position_embeddings": rotary,
            "position_ids": position_ids,
            "past_key_values": cache,
            **kwargs,
        }
        masks, steps = {}, {}
        for kind in set(self._kinds):
            alone = [first == last for first, last in self._chains if self._kinds[first] == kind]
            if any(alone):
                masks[kind] = MASKS[kind](self.config, **inputs)
            if not all(alone):
                until = visible if kind == "full_attention" else None
                explicit = explicit_mask(self.config, kind, **inputs, visible=until)
                steps[kind] = Step(rotary, position_ids, explicit, cache, until)
        for first, last in self._chains:
            kind = self._kinds[first]
            if first == last:
                hidden = self.layers[first](
                    hidden, attention_mask=masks[kind], use_cache=cache is not None, **plain
                )
            elif self.gradient_checkpointing and self.training:
                run = partial(self._chain, first=first, last=last, step=steps[kind])
                hidden = self._gradient_checkpointing_func(run, hidden)
            else:
                hidden = self._chain(hidden, first=first, last=last, step=steps[kind])
        return hidden

    def _chain(self, hidden: Tensor, *, first: int, last: int, step: Step) -> Tensor:
        """From a producer to the last layer that shares its scores."""
        hidden, scores = self.layers[first](hidden, None, step)
        for i in range(first + 1, last + 1):
            hidden, made = self.layers[i](hidden, scores, step)
            scores = made if self.lisa.source == "prev" else scores
        return hidden


class LisaForCausalLM(LisaPreTrained):
    """Trunk and output layer. Used before a `...ForCausalLM` class of transformers in the list of bases."""

    _trunk: type[LisaTrunk]

    def __init__(self, config: PreTrainedConfig) -> None:
        # Not the parent's, which would build the trunk without sharing first.
        PreTrainedModel.__init__(self, config)
        self.model = self._trunk(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(*, attention_mask: Tensor | None, **_: Any) -> Tensor | None:
        """`generate` prepares masks for static caches; ours depend on the role of a layer."""
        return attention_mask


def _check_signature(layer: nn.Module) -> None:
    """Layers take any keyword, so one that they do not know would be ignored and decoding go wrong in silence."""
    if "past_key_values" not in inspect.signature(layer.forward).parameters:
        raise ImportError(
            f"The layers of transformers {transformers.__version__} take their cache under another name than "
            "`past_key_values`, so a model with shared attention scores would decode without one. "
            "Install `transformers<5.24`."
        )


def _visible(cache: Cache | None, queries: int) -> int | None:
    """How many keys of static full-attention layers exist after this step; None if the cache grows."""
    for layer in [] if cache is None else cache.layers:
        if isinstance(layer, StaticLayer) and not isinstance(layer, StaticSlidingWindowLayer):
            return int(layer.get_seq_length()) + queries
    return None
