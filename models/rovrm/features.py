"""Features of preference samples, by which data are selected (RoVRM section 4.3), from a reward model of either kind.

| kind | feature of a sample |
| --- | --- |
| `lora_grad` | gradient of its ranking loss with respect to new LoRA weights, after a random projection |
| `head_grad` | direction of its gradient with respect to the reward head, (e_l − e_w) / ‖e_l − e_w‖ |
| `hidden` | the states e_w and e_l that the head reads, side by side, of unit length |

e_w and e_l are the last-token states of the best and the worst answer. Gradients are plain ones, also for the pool:
LESS divides those of the pool by Adam's moments, which a frozen model does not have.

Shapes: N samples, R rows (answers), K numbers of a feature, D width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from eagleray.models.gram.batching import pad_right, token_batches
from eagleray.models.gram.discriminative import DiscriminativeScorer, sequence_rewards
from eagleray.models.rovrm.checkpoint import is_reward_model
from eagleray.models.rovrm.images import ImageLimits
from eagleray.models.rovrm.losses import plackett_luce_loss
from eagleray.models.rovrm.scoring import Prepared, VisualScorer, collate, moved
from eagleray.models.selection.features import head_gradients, hidden_features
from eagleray.models.selection.gradients import SampleGradients, add_probes
from eagleray.models.selection.projection import RandomProjection

FeatureKind = Literal["lora_grad", "head_grad", "hidden"]
_LEAST_FILL = 0.8


@dataclass(frozen=True)
class FeatureSettings:
    """Which features, and of what size."""

    kind: FeatureKind = "lora_grad"
    rank: int = 16
    """Of the LoRA weights, for `lora_grad`."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Layers of the language model that get LoRA weights."""
    width: int = 2048
    """Numbers after the projection; a multiple of 8."""
    seed: int = 0
    """Of the LoRA weights and of the projection."""


class RewardBody(Protocol):
    """A reward model as features need it."""

    model: nn.Module
    head: nn.Linear
    """Its input is the states that rewards are read from: [R, D], or [R, T, D] of right-padded rows."""
    layers: nn.Module
    """Where LoRA weights go."""

    def prepare(self, prompt: str, answers: Sequence[str], image: bytes | None) -> list[Any]:
        """The answers to one prompt, each with its `ids`."""
        ...

    def rewards(self, rows: Sequence[Any]) -> Tensor:
        """Rewards [R], differentiable."""
        ...


class VisualBody:
    """A visual reward model."""

    def __init__(self, scorer: VisualScorer) -> None:
        body: Any = scorer.model.model
        self.model: nn.Module = scorer.model
        self.head: nn.Linear = scorer.model.v_head
        self.layers: nn.Module = body.language_model
        self.prepare: Callable[..., list[Any]] = scorer.prepare

    def rewards(self, rows: Sequence[Prepared]) -> Tensor:
        """Rewards [R]."""
        return self.model(*moved(collate(rows), self.head.weight.device))


class TextBody:
    """A reward model of texts, as `gram.discriminative` trains them."""

    def __init__(self, scorer: DiscriminativeScorer) -> None:
        self._encoder = scorer.encoder
        self.model: Any = scorer.model
        self.head, self.layers = self.model.score, self.model.base_model

    def prepare(self, prompt: str, answers: Sequence[str], image: bytes | None) -> list[Prepared]:
        """The answers as conversations, cut where they are too long.

        Raises:
            ValueError: There is a picture.
        """
        if image is not None:
            raise ValueError(
                "This reward model reads texts only, and the sample has a picture. Give `form: caption` or "
                "`form: question`, or take a visual reward model."
            )
        return [Prepared(self._encoder.encode(prompt, answer), None) for answer in answers]

    def rewards(self, rows: Sequence[Prepared]) -> Tensor:
        """Rewards [R]."""
        ids_RT, mask_RT = pad_right([row.ids for row in rows], pad_id=self._encoder.pad_id)
        device = self.head.weight.device
        return sequence_rewards(self.model, ids_RT.to(device), mask_RT.to(device))


class Featuriser:
    """Turns prepared samples into rows of features; none depends on what shares its batch."""

    def __init__(self, body: RewardBody, settings: FeatureSettings, *, max_batch_tokens: int = 16384) -> None:
        """Set up a model; for `lora_grad` it gets LoRA weights, which leave its rewards as they are.

        Args:
            body: The model.
            settings: Kind and size.
            max_batch_tokens: Tokens of one pass, padding included.
        """
        self.body, self.settings, self.max_batch_tokens = body, settings, max_batch_tokens
        body.model.eval().requires_grad_(False)
        self.prepare = body.prepare
        if settings.kind == "lora_grad":
            probes = add_probes(body.layers, rank=settings.rank, targets=settings.targets, seed=settings.seed)
            projection = RandomProjection(settings.width, seed=settings.seed)
            self._gradients = SampleGradients(probes, projection)
            self.width = settings.width
        else:
            self.width = body.head.in_features * (2 if settings.kind == "hidden" else 1)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        settings: FeatureSettings,
        *,
        limits: ImageLimits = ImageLimits(),  # noqa: B008 - frozen
        max_batch_tokens: int = 16384,
    ) -> Featuriser:
        """Load a reward model.

        Args:
            path: Folder of a visual reward model, or a text reward model (folder, adapter or hub name).
            settings: Kind and size.
            limits: Of pictures.
            max_batch_tokens: Tokens of one pass.
        """
        body: RewardBody
        if is_reward_model(path):
            body = VisualBody(VisualScorer.from_pretrained(path, limits=limits))
        else:
            body = TextBody(DiscriminativeScorer.from_pretrained(path))
        return cls(body, settings, max_batch_tokens=max_batch_tokens)

    def features(self, samples: Sequence[Sequence[Any]]) -> np.ndarray:
        """Features [N, K] of samples from `prepare`, best answer first, in their order; float32, of unit length."""
        found_NK = np.zeros((len(samples), self.width), dtype=np.float32)
        for answers in sorted({len(sample) for sample in samples}):
            group = [i for i, sample in enumerate(samples) if len(sample) == answers]
            lengths = [max(len(row.ids) for row in samples[i]) * answers for i in group]
            for members in token_batches(lengths, max_tokens=self.max_batch_tokens, least_fill=_LEAST_FILL):
                chosen = [group[i] for i in members]
                rows = [row for i in chosen for row in samples[i]]
                found_NK[chosen] = self._batch(rows, answers).float().cpu().numpy()
        return found_NK / np.maximum(np.linalg.norm(found_NK, axis=1, keepdims=True), 1e-12)

    def _batch(self, rows: Sequence[Any], answers: int) -> Tensor:
        if self.settings.kind == "lora_grad":
            return self._gradients(
                lambda: plackett_luce_loss(self.body.rewards(rows).view(-1, answers), reduction="sum"),
                answers=answers,
            )
        states_BKD = self._states(rows).view(-1, answers, self.body.head.in_features)
        best_BD, worst_BD = states_BKD[:, 0], states_BKD[:, -1]
        if self.settings.kind == "head_grad":
            return head_gradients(best_BD, worst_BD)
        return hidden_features(best_BD, worst_BD)

    def _states(self, rows: Sequence[Any]) -> Tensor:
        """What the head reads of each row [R, D]."""
        seen: list[Tensor] = []
        handle = self.body.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            with torch.inference_mode():
                self.body.rewards(rows)
        finally:
            handle.remove()
        [states] = seen
        if states.dim() == 2:
            return states
        last_R = torch.tensor([len(row.ids) - 1 for row in rows], device=states.device)
        return states[torch.arange(len(rows), device=states.device), last_R]
