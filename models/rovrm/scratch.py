"""A small LLaVA with random weights: CLIP-style tower, projector, small Llama; nothing is downloaded.

Pictures are resized to a square, whatever their shape: cropping would cut away the sides of a wide one, and padding
would spend most patches on nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AddedToken,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaModel,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from eagleray.models.rovrm.model import VisualRewardModel
from eagleray.models.rovrm.records import IMAGE_MARKER


def add_image_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """Give a tokenizer the token that stands for a patch; its id."""
    tokenizer.add_tokens([AddedToken(IMAGE_MARKER, special=True)], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_MARKER))  # type: ignore[arg-type]


def image_processor(image_size: int) -> Any:
    """Resizes to a square and scales colours to [−1, 1]."""
    return CLIPImageProcessorPil(
        size={"height": image_size, "width": image_size},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def build_llava(
    text: LlamaConfig,
    *,
    image_token_id: int,
    image_size: int = 64,
    patch_size: int = 16,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    seed: int = 0,
) -> VisualRewardModel:
    """A reward model with random weights that depend on `seed` alone; the global random state stays as it was.

    Args:
        text: The language model.
        image_token_id: Token that stands for a patch; below the size of the vocabulary.
        image_size: Side of a picture in pixels; a multiple of `patch_size`.
        patch_size: Side of a patch.
        width: Width of the vision tower.
        layers: Its blocks. Features are taken from the last one: a small tower has none to spare.
        heads: Its attention heads; must divide `width`.
        seed: Of all weights.

    Raises:
        ValueError: The sizes do not fit together.
    """
    for name, size, divisor in (("image_size", image_size, patch_size), ("width", width, heads)):
        if size % divisor:
            raise ValueError(f"`{name}` is {size}; it must be a multiple of {divisor}.")
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=width,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisualRewardModel(LlavaModel(config), seed=seed)
