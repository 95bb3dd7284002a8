"""Causal language models and classifiers with shared attention scores: Llama, Qwen2, Qwen3 and Mistral.

They are ordinary transformers models: `AutoModelForCausalLM.from_pretrained`, `save_pretrained`, `generate`.
Importing this module registers them with the Auto classes, and `kernels.grouped_attention` as a kernel.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    MistralForCausalLM,
    MistralModel,
    MistralPreTrainedModel,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2PreTrainedModel,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3PreTrainedModel,
)
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer

from eagleray.models.lisa.config import LisaLlamaConfig, LisaMistralConfig, LisaQwen2Config, LisaQwen3Config
from eagleray.models.lisa.kernels import GROUPED, grouped_attention
from eagleray.models.lisa.layers import LisaDecoderLayer, ProducerAttention, SharedAttention
from eagleray.models.lisa.trunk import LisaForCausalLM, LisaPreTrained, LisaTrunk


def _records(layer: type, attention: type) -> dict[str, Any]:
    """Whose outputs `output_hidden_states` and `output_attentions` collect."""
    return {
        "hidden_states": [layer, LisaDecoderLayer],
        "attentions": [attention, ProducerAttention, SharedAttention],
    }


class LisaLlamaModel(LisaTrunk, LlamaModel):
    config_class = LisaLlamaConfig
    _can_record_outputs = _records(LlamaDecoderLayer, LlamaAttention)


class LisaLlamaForCausalLM(LisaForCausalLM, LlamaForCausalLM):
    config_class = LisaLlamaConfig
    _trunk = LisaLlamaModel


class LisaLlamaForSequenceClassification(
    GenericForSequenceClassification, LisaPreTrained, LlamaPreTrainedModel
):
    config_class = LisaLlamaConfig


class LisaQwen2Model(LisaTrunk, Qwen2Model):
    config_class = LisaQwen2Config
    _can_record_outputs = _records(Qwen2DecoderLayer, Qwen2Attention)


class LisaQwen2ForCausalLM(LisaForCausalLM, Qwen2ForCausalLM):
    config_class = LisaQwen2Config
    _trunk = LisaQwen2Model


class LisaQwen2ForSequenceClassification(
    GenericForSequenceClassification, LisaPreTrained, Qwen2PreTrainedModel
):
    config_class = LisaQwen2Config


class LisaQwen3Model(LisaTrunk, Qwen3Model):
    config_class = LisaQwen3Config
    _can_record_outputs = _records(Qwen3DecoderLayer, Qwen3Attention)


class LisaQwen3ForCausalLM(LisaForCausalLM, Qwen3ForCausalLM):
    config_class = LisaQwen3Config
    _trunk = LisaQwen3Model


class LisaQwen3ForSequenceClassification(
    GenericForSequenceClassification, LisaPreTrained, Qwen3PreTrainedModel
):
    config_class = LisaQwen3Config


class LisaMistralModel(LisaTrunk, MistralModel):
    config_class = LisaMistralConfig
    _can_record_outputs = _records(MistralDecoderLayer, MistralAttention)


class LisaMistralForCausalLM(LisaForCausalLM, MistralForCausalLM):
    config_class = LisaMistralConfig
    _trunk = LisaMistralModel


class LisaMistralForSequenceClassification(
    GenericForSequenceClassification, LisaPreTrained, MistralPreTrainedModel
):
    config_class = LisaMistralConfig


ARCHITECTURES: dict[str, tuple[type[Any], type[PreTrainedModel]]] = {
    "llama": (LisaLlamaConfig, LisaLlamaForCausalLM),
    "qwen2": (LisaQwen2Config, LisaQwen2ForCausalLM),
    "qwen3": (LisaQwen3Config, LisaQwen3ForCausalLM),
    "mistral": (LisaMistralConfig, LisaMistralForCausalLM),
}
"""`model_type` of a teacher -> what it is converted into."""


def _grouped_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    # `sdpa` may leave a causal mask out and rely on a flag of its kernel, which ours does not have.
    return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, _grouped_mask)
for _config, _trunk, _lm, _classifier in (
    (LisaLlamaConfig, LisaLlamaModel, LisaLlamaForCausalLM, LisaLlamaForSequenceClassification),
    (LisaQwen2Config, LisaQwen2Model, LisaQwen2ForCausalLM, LisaQwen2ForSequenceClassification),
    (LisaQwen3Config, LisaQwen3Model, LisaQwen3ForCausalLM, LisaQwen3ForSequenceClassification),
    (LisaMistralConfig, LisaMistralModel, LisaMistralForCausalLM, LisaMistralForSequenceClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _trunk, exist_ok=True)
    AutoModelForCausalLM.register(_config, _lm, exist_ok=True)
    AutoModelForSequenceClassification.register(_config, _classifier, exist_ok=True)
