"""A convolutional vision tower for models that start from random weights.

A transformer over patches has to find out from data that neighbouring pixels belong together; a few thousand small
pictures do not teach it that. Convolutions have it built in. The tower is registered with transformers, so that a
LLaVA configuration may name it (`model_type: conv_tower`) and `AutoModel` builds it once this module is imported.

Shapes: I pictures, C channels, H and W pixels, L positions, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

GROUPS = 8
"""Groups of channels that are normalised together."""


class ConvTowerConfig(PreTrainedConfig):
    """Size of a `ConvTower`."""

    model_type = "conv_tower"

    hidden_size: int = 128
    """D; a multiple of 8 times half of `patch_size`, so that every stage's channels fall into groups."""
    patch_size: int = 16
    """Pixels of a position in either direction; a power of two."""
    num_channels: int = 3


class _Stage(nn.Module):
    """Halves height and width, then a residual block."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.norm_in = nn.GroupNorm(GROUPS, width)
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.norm_out = nn.GroupNorm(GROUPS, width)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.norm_in(self.down(x)))
        return x + nn.functional.gelu(self.norm_out(self.mix(x)))


class ConvTower(PreTrainedModel):
    """Stages of convolutions, each of half the resolution and twice the channels of the one before."""

    config_class = ConvTowerConfig
    base_model_prefix = "conv_tower"
    main_input_name = "pixel_values"
    # It has no attention, so whatever the language model uses is right for it.
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: ConvTowerConfig) -> None:
        super().__init__(config)
        stages = config.patch_size.bit_length() - 1
        widths = [config.hidden_size >> (stages - 1 - i) for i in range(stages)]
        channels = [config.num_channels, *widths[:-1]]
        self.stages = nn.ModuleList(map(_Stage, channels, widths))
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Features [I, L, D] of pictures [I, C, H, W], rows of positions from the top."""
        x = pixel_values.to(self.dtype)
        for stage in self.stages:
            x = stage(x)
        states_ILD = x.flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=states_ILD, hidden_states=(states_ILD,))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]


AutoConfig.register(ConvTowerConfig.model_type, ConvTowerConfig)
AutoModel.register(ConvTowerConfig, ConvTower)
