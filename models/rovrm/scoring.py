"""The scorer that evaluation and serving share: one code path from bytes and texts to rewards.

Work is in two steps, because a server decodes pictures in many threads and runs the model in one: `prepare` (checks,
decoding, tokens) and `rewards` (the model).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from eagleray.models.gram.batching import pad_right, token_batches
from eagleray.models.rovrm.checkpoint import load_encoder, load_reward_model
from eagleray.models.rovrm.encoding import VisualEncoder
from eagleray.models.rovrm.families import Pixels, join_pixels
from eagleray.models.rovrm.images import ImageLimits, decode_image
from eagleray.models.rovrm.model import VisualRewardModel


class TooLongError(ValueError):
    """A sample does not fit into the model; nothing of it is cut."""

    def __init__(self, tokens: int, limit: int, image_tokens: int) -> None:
        picture = f", {image_tokens} of them of the picture" if image_tokens else ""
        super().__init__(f"prompt and answer take {tokens} tokens{picture}; the model takes {limit}")
        self.tokens, self.limit = tokens, limit


@dataclass(frozen=True, eq=False)
class Prepared:
    """One answer, ready for the model; answers about one picture hold the same `pixels` object."""

    ids: list[int]
    pixels: Pixels | None


class VisualScorer:
    """A visual reward model with what it needs to be asked."""

    def __init__(
        self,
        model: VisualRewardModel,
        encoder: VisualEncoder,
        *,
        limits: ImageLimits = ImageLimits(),  # noqa: B008 - frozen
        max_batch_tokens: int = 16384,
    ) -> None:
        self.model, self.encoder = model.eval(), encoder
        self.limits, self.max_batch_tokens = limits, max_batch_tokens

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> VisualScorer:
        """Load a model folder.

        Args:
            folder: Written by `rovrm.train`.
            device: Default: the GPU if there is one.
            dtype: Arithmetic; default: as saved.
            options: Of the constructor.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = load_reward_model(folder, dtype=dtype).to(device)
        return cls(model, load_encoder(folder), **options)

    def prepare(
        self, prompt: str, answers: Sequence[str], image: bytes | Image.Image | None = None
    ) -> list[Prepared]:
        """Check and encode the answers to one prompt; the picture is the content of a file, or decoded already.

        Raises:
            ImageError: The picture cannot be used.
            TooLongError: An answer does not fit.
        """
        pixels = count = None
        if image is not None:
            decoded = decode_image(image, self.limits) if isinstance(image, bytes) else image
            pixels = self.encoder.pixels(decoded)
            count = self.encoder.family.image_tokens(pixels)
        prepared = []
        for answer in answers:
            ids = self.encoder.encode(prompt, answer, image_tokens=count)
            if not self.encoder.fits(ids):
                raise TooLongError(len(ids), self.encoder.max_length, count or 0)
            prepared.append(Prepared(ids, pixels))
        return prepared

    def rewards(self, prepared: Sequence[Prepared]) -> list[float]:
        """Rewards in the order given; batches are cut by tokens, longest answers first."""
        rewards = [0.0] * len(prepared)
        lengths = [len(item.ids) for item in prepared]
        for members in token_batches(lengths, max_tokens=self.max_batch_tokens):
            inputs = collate([prepared[i] for i in members], pad_id=0)
            with torch.inference_mode():
                found = self.model(*moved(inputs, next(self.model.parameters()).device)).tolist()
            for i, reward in zip(members, found, strict=True):
                rewards[i] = reward
        return rewards

    def score(self, prompt: str, answers: Sequence[str], image: bytes | None = None) -> list[float]:
        """Rewards of the answers to one prompt; errors are those of `prepare`."""
        return self.rewards(self.prepare(prompt, answers, image))


def collate(
    items: Sequence[Prepared], *, pad_id: int = 0
) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor] | None]:
    """Arguments of `VisualRewardModel.forward`, padded on the right; each picture is there once.

    What fills the padding does not matter: it is masked, and the reward is read by position.
    """
    ids_BT, mask_BT = pad_right([item.ids for item in items], pad_id=pad_id)
    pictures: dict[int, Pixels] = {id(item.pixels): item.pixels for item in items if item.pixels is not None}
    if not pictures:
        return ids_BT, mask_BT, None, None
    places = {key: place for place, key in enumerate(pictures)}
    index_B = torch.tensor([places.get(id(item.pixels), -1) for item in items])
    return ids_BT, mask_BT, index_B, join_pixels(list(pictures.values()))


def moved(inputs: tuple[Any, ...], device: torch.device) -> list[Any]:
    """What `collate` gave, on a device."""
    return [
        {name: tensor.to(device) for name, tensor in value.items()}
        if isinstance(value, dict)
        else None
        if value is None
        else value.to(device)
        for value in inputs
    ]
