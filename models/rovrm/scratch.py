"""A small LLaVA with random weights: vision tower, projector, small Llama; nothing is downloaded.

Pictures are resized to one shape: cropping would cut away the sides of a wide one, and padding would spend most patches
on nothing.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import (
    AddedToken,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from eagleray.models.rovrm.model import VisualRewardModel
from eagleray.models.rovrm.records import IMAGE_MARKER
from eagleray.models.rovrm.tower import GROUPS, ConvTowerConfig

Tower = Literal["clip", "conv"]


def add_image_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """Give a tokenizer the token that stands for a patch; its id."""
    tokenizer.add_tokens([AddedToken(IMAGE_MARKER, special=True)], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_MARKER))  # type: ignore[arg-type]


def image_processor(height: int, width: int | None = None) -> Any:
    """Resizes to one shape, by default a square, and scales colours to [−1, 1]."""
    return CLIPImageProcessorPil(
        size={"height": height, "width": width or height},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def llava_config(
    text: LlamaConfig,
    *,
    image_token_id: int,
    tower: Tower = "clip",
    image_size: int = 64,
    image_width: int | None = None,
    patch_size: int = 16,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
) -> LlavaConfig:
    """Configuration of a small LLaVA.

    Args:
        text: The language model.
        image_token_id: Token that stands for a patch; below the size of the vocabulary.
        tower: `conv`, or `clip`: a transformer over patches.
        image_size: Height of a picture in pixels; a multiple of `patch_size`.
        image_width: Width of a picture, likewise; default: a square, which `clip` needs.
        patch_size: Side of a patch.
        width: Width of the vision tower.
        layers: Blocks of `clip`. Features are taken from the last one: a small tower has none to spare.
        heads: Attention heads of `clip`; must divide `width`.

    Raises:
        ValueError: The sizes do not fit together.
    """
    across = image_width or image_size
    groups = heads if tower == "clip" else GROUPS * patch_size // 2
    for name, size, divisor in (
        ("image_size", image_size, patch_size),
        ("image_width", across, patch_size),
        ("width", width, groups),
    ):
        if size % divisor:
            raise ValueError(f"`{name}` is {size}; it must be a multiple of {divisor}.")
    if tower == "conv" and patch_size & (patch_size - 1):
        raise ValueError(f"`patch_size` is {patch_size}; it must be a power of two for a `conv` tower.")
    if tower == "clip" and across != image_size:
        raise ValueError("A `clip` tower takes squares only; leave `image_width` out, or take `tower: conv`.")
    vision: PreTrainedConfig
    if tower == "conv":
        vision = ConvTowerConfig(hidden_size=width, patch_size=patch_size)
    else:
        vision = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            image_size=image_size,
            patch_size=patch_size,
            projection_dim=width,
        )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token_id,
        image_seq_length=(image_size // patch_size) * (across // patch_size),
        vision_feature_layer=-1,
        # A class token stands before the patches of `clip`, and nothing before those of `conv`.
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        tie_word_embeddings=text.tie_word_embeddings,
    )


def build_llava(config: LlavaConfig, *, seed: int = 0) -> VisualRewardModel:
    """A reward model with random weights that depend on `seed` alone; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisualRewardModel(LlavaModel(config), seed=seed)


def build_captioner(config: LlavaConfig, *, seed: int = 0) -> LlavaForConditionalGeneration:
    """The same body with a vocabulary head, likewise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config)


def llava_processor(
    config: LlavaConfig, tokenizer: Any, image_processor: Any, template: str
) -> LlavaProcessor:
    """What transformers and trl lay out conversations about pictures with; `template` is the chat template."""
    vision: Any = config.vision_config
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(config.vision_feature_select_strategy == "default"),
        chat_template=template,
    )
