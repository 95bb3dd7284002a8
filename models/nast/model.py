"""NAST as a Hugging Face model: `NastModel(NastConfig(...))`, `save_pretrained`, `from_pretrained`.

Shapes: B clips, T feature frames, F features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import initialization as init

from eagleray.models.nast.attention import XAVIER_GAIN, CrossAttention, SelfAttention
from eagleray.models.nast.config import NastConfig
from eagleray.models.nast.encoder import DrawOracle, NastOutput, StackedEncoder


class SpeechModel(PreTrainedModel):
    """What both models share: initialisation as in the reference, and gradient checkpointing by layer."""

    config_class = NastConfig
    main_input_name = "features_BTF"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def tie_heads(self, *further: str) -> None:
        """Let the source head, if it has the same vocabulary, and `further` weights be the target head's weight."""
        sources = [] if self.config.source_vocab_size else ["encoder.source_head.weight"]
        self._tied_weights_keys = dict.fromkeys([*sources, *further], "encoder.target_head.weight")

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        # All else, acoustic attention too, keeps torch's own initialisation or that of its constructor.
        if isinstance(module, SelfAttention | CrossAttention):
            for name in ("query_key_value", "query", "key_value"):
                linear = getattr(module, name, None)
                # `from_pretrained` marks what it has loaded; the blocks are views and do not carry the mark.
                if linear is not None and not getattr(linear.weight, "_is_hf_initialized", False):
                    for block in linear.weight.split(linear.in_features):
                        init.xavier_uniform_(block, gain=XAVIER_GAIN)
            init.xavier_uniform_(module.output.weight)
            init.zeros_(module.output.bias)


class NastModel(SpeechModel):
    """Speech to source and target CTC logits in one pass."""

    def __init__(self, config: NastConfig) -> None:
        super().__init__(config)
        self.encoder = StackedEncoder(config)
        self.tie_heads()
        self.post_init()

    def forward(
        self, features_BTF: Tensor, lengths_B: Tensor, *, draw_oracle: DrawOracle | None = None
    ) -> NastOutput:
        """Logits of all heads.

        Args:
            features_BTF: Normalised log-mel features, padded on the right with anything finite.
            lengths_B: Frames of each clip, int, at least 1.
            draw_oracle: What inner target predictions are told in training (`curriculum.py`).
        """
        return self.encoder(features_BTF, lengths_B, draw_oracle=draw_oracle)
