"""What differs between families of vision-language models: how many tokens a picture takes, and where parts lie.

Everything else (merging features into the sequence, positions, attention) is done by transformers' own models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Part = Literal["vision_tower", "projector", "language_model", "v_head"]
Pixels = dict[str, Tensor]
"""One picture as the image processor gives it; pictures of a batch are joined along the first axis."""


@dataclass(frozen=True)
class Family(ABC):
    """Base of the families; `config` is the configuration of the whole model."""

    config: Any
    projector: tuple[str, ...] = ("multi_modal_projector.",)
    vision: tuple[str, ...] = ("vision_tower.",)

    @property
    def image_token_id(self) -> int:
        """Id of the token that stands for one piece of a picture."""
        return self.config.image_token_id

    @abstractmethod
    def image_tokens(self, pixels: Pixels) -> int:
        """How many tokens a picture takes."""

    def image_ids(self, count: int) -> list[int]:
        """The token ids that stand for a picture of `count` pieces."""
        return [self.image_token_id] * count

    def inputs(self, input_ids_BT: Tensor, used: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Further arguments of the forward pass; `used` are the processor's outputs, one picture a row that has one."""
        return {}

    def part_of(self, name: str) -> Part:
        """The part that a parameter of the body belongs to."""
        if name.startswith(self.projector):
            return "projector"
        return "vision_tower" if name.startswith(self.vision) else "language_model"


class LlavaFamily(Family):
    """LLaVA-1.5: every picture has one size, and each patch of the tower is a token."""

    def image_tokens(self, pixels: Pixels) -> int:
        height, width = pixels["pixel_values"].shape[-2:]
        vision = self.config.vision_config
        tokens = (height // vision.patch_size) * (width // vision.patch_size)
        has_class_token = vision.model_type == "clip_vision_model"
        return tokens + has_class_token - (self.config.vision_feature_select_strategy == "default")


class QwenFamily(Family):
    """Qwen2-VL and Qwen2.5-VL: pictures keep their shape, and the projector is the last part of the tower."""

    def image_tokens(self, pixels: Pixels) -> int:
        return int(pixels["image_grid_thw"].prod()) // self.config.vision_config.spatial_merge_size**2

    def image_ids(self, count: int) -> list[int]:
        return [self.config.vision_start_token_id, *super().image_ids(count), self.config.vision_end_token_id]

    def inputs(self, input_ids_BT: Tensor, used: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kinds_BT = (input_ids_BT == self.image_token_id).int()
        return {"mm_token_type_ids": kinds_BT, "image_grid_thw": used["image_grid_thw"]}


def family_of(config: Any) -> Family:
    """The family of a model.

    Raises:
        ValueError: The model is of none of them.
    """
    if config.model_type == "llava":
        return LlavaFamily(config)
    if config.model_type in ("qwen2_vl", "qwen2_5_vl"):
        return QwenFamily(config, projector=("visual.merger.",), vision=("visual.",))
    raise ValueError(
        f"The model is a {config.model_type!r}; a visual reward model can be built on llava, qwen2_vl and qwen2_5_vl."
    )


def join_pixels(pictures: Sequence[Pixels]) -> Pixels:
    """Several pictures as one batch of the vision tower."""
    return {name: torch.cat([picture[name] for picture in pictures]) for name in pictures[0]}
