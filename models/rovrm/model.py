"""The visual reward model: a vision-language body and a bias-free head that reads the reward at the last token.

Special here:

- The last token is found by position, from the attention mask; never by looking for a padding id, which a vision
  config may hold in the wrong place.
- Rows with and without a picture share a batch. Answers about one picture share its features: it goes through the
  tower once.
- A picture that no row of the batch uses is computed all the same and weighs nothing. That keeps the graph alike on
  all workers when a share of a batch happens to hold texts only.

Shapes: B answers, T tokens, D width, I pictures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from eagleray.models.backbone.last_layer import last_layer_at
from eagleray.models.rovrm.families import Part, family_of

Phase = Literal[1, 2, 3]

TRAINED: dict[int, tuple[Part, ...]] = {
    1: ("language_model", "v_head"),
    2: ("language_model", "v_head"),
    3: ("projector", "language_model", "v_head"),
}
"""Which parts each phase trains (spec section 3): texts, captions, pictures."""


class VisualRewardModel(nn.Module):
    """`model` is a body of transformers without its vocabulary head; `v_head` is one row of weights."""

    def __init__(self, model: nn.Module, *, seed: int = 0) -> None:
        """Put a new head on a body.

        Args:
            model: A `LlavaModel` or another body of a known family.
            seed: Of the head's weights, which make the first rewards of size one.
        """
        super().__init__()
        self.model = model
        self.family = family_of(model.config)
        width = self.config.get_text_config().hidden_size
        self.v_head = nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.v_head.weight, std=width**-0.5, generator=torch.Generator().manual_seed(seed))

    @property
    def config(self) -> Any:
        """Configuration of the body."""
        return self.model.config

    def forward(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        image_index_B: Tensor | None = None,
        pixels: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Rewards [B] in float32.

        Args:
            input_ids_BT: Encoded answers, padded on either side.
            attention_mask_BT: 1 at tokens, 0 at padding.
            image_index_B: Which of the pictures a row shows, −1 for none.
            pixels: Outputs of the image processor for I pictures.
        """
        further: dict[str, Any] = {}
        unused = None
        if pixels is not None:
            assert image_index_B is not None
            further, unused = self._see(input_ids_BT, image_index_B, pixels)
        mask_BT = attention_mask_BT.long()
        positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        last_B = (mask_BT * positions_T).argmax(1)
        with last_layer_at(self.model, last_B, mask_BT) as at_last:
            hidden_BTD = self.model(
                input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False, **further
            ).last_hidden_state
        rows_B = torch.arange(len(last_B), device=last_B.device)
        read_BD = hidden_BTD[:, 0] if at_last else hidden_BTD[rows_B, last_B]
        rewards_B = self.v_head(read_BD)[:, 0].float()
        return rewards_B if unused is None else rewards_B + 0.0 * unused

    def train_parts(self, phase: Phase, *, train_vision_tower: bool = False) -> list[str]:
        """Freeze all but what a phase trains; the names of the trained parameters.

        Args:
            phase: 1 (text), 2 (captions) or 3 (pictures).
            train_vision_tower: Also train the tower, in phase 3; for small towers that start from random weights.

        Raises:
            ValueError: The tower is to be trained in a phase without pictures.
        """
        if train_vision_tower and phase != 3:
            raise ValueError(f"`train_vision_tower` goes with phase 3; phase {phase} has no pictures.")
        parts = (*TRAINED[phase], *(("vision_tower",) if train_vision_tower else ()))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.part_of(name) in parts)
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def part_of(self, name: str) -> Part:
        """The part of the model that a parameter belongs to."""
        return "v_head" if name.startswith("v_head.") else self.family.part_of(name.removeprefix("model."))

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations of the body in the backward pass."""
        self.model.gradient_checkpointing_enable(**options)  # type: ignore[operator]

    def save_pretrained(self, path: str | Path, *, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write weights as safetensors (in pieces of 5 GB) and the configuration of the body.

        transformers' own classes read the folder too: the body has the names it has there.
        """
        Path(path).mkdir(parents=True, exist_ok=True)
        state = self.state_dict() if state_dict is None else state_dict
        save_torch_state_dict(state, str(path), max_shard_size="5GB")
        values = {**self.config.to_dict(), "dtype": str(self.v_head.weight.dtype).removeprefix("torch.")}
        (Path(path) / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")

    def _see(
        self, input_ids_BT: Tensor, image_index_B: Tensor, pixels: dict[str, Tensor]
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Arguments that put the pictures' features into their rows, and a value that depends on the unused ones."""
        body: Any = self.model
        features = body.get_image_features(**pixels, return_dict=True).pooler_output
        rows = [int(i) for i in image_index_B.tolist() if i >= 0]
        spare = [feature.sum() for i, feature in enumerate(features) if i not in rows]
        unused = torch.stack(spare).sum().float() if spare else None
        if not rows:
            return {}, unused
        picked = {name: values[rows] for name, values in pixels.items() if len(values) == len(features)}
        outputs = BaseModelOutputWithPooling(pooler_output=[features[i] for i in rows])  # type: ignore[arg-type]
        return {"mm_encoder_outputs": {"image": outputs}, **self.family.inputs(input_ids_BT, picked)}, unused
