"""Phase A: every shared layer learns by itself to give the teacher's attention, from the teacher's inputs.

A layer needs the teacher's normalised inputs x of itself and of its source, and the teacher's attention weights; the
rest of the model need not be in memory. `record_inputs` makes the inputs (to be cached), `LayerDistiller` turns them
into losses. There is no backward pass through the model and no error of one layer in another's input.

Shapes: B sequences, T tokens, K recorded layers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from eagleray.models.lisa.config import layer_kinds
from eagleray.models.lisa.kernels import attention_weights, full_scores, weighted_values
from eagleray.models.lisa.layers import SharedAttention, Step, queries_and_keys
from eagleray.models.lisa.losses import Reduction, attention_kl, output_mse, score_mse
from eagleray.models.lisa.masks import explicit_mask
from eagleray.models.lisa.spec import LisaSpec
from eagleray.models.lisa.teacher import LayerView, check_supported, observing, visible_rows

Trained = Literal["lisa", "full"]


@dataclass(frozen=True)
class LocalWeights:
    """How much each layer-local loss counts."""

    kl: float = 1.0
    mse_scores: float = 0.0
    mse_out: float = 1.0

    def __post_init__(self) -> None:
        if min(self.kl, self.mse_scores, self.mse_out) < 0 or not (
            self.kl or self.mse_scores or self.mse_out
        ):
            raise ValueError(
                f"The weights of the losses are {self}; none may be negative and one must be positive."
            )


def sources(spec: LisaSpec, layers: int) -> dict[int, int]:
    """Shared layer -> the layer whose scores it takes."""
    anchors = {i: first for first, last in spec.chains(layers) for i in range(first + 1, last + 1)}
    return anchors if spec.source == "anchor" else {i: i - 1 for i in anchors}


def is_lisa_parameter(name: str) -> bool:
    """Whether a parameter was added by conversion."""
    return ".self_attn.align." in name or ".self_attn.q_lr." in name or ".self_attn.k_lr." in name


def set_trained(model: nn.Module, trained: Trained) -> None:
    """Train what conversion added, or everything."""
    if trained not in ("lisa", "full"):
        raise ValueError(f"`trained` is {trained!r}; it must be 'lisa' or 'full'.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained == "full" or is_lisa_parameter(name))


def recorded_layers(spec: LisaSpec, layers: int) -> tuple[int, ...]:
    """Layers whose inputs phase A needs."""
    pairs = sources(spec, layers)
    return tuple(sorted({*pairs, *pairs.values()}))


@torch.no_grad()
def record_inputs(
    teacher: Any, input_ids: Tensor, attention_mask: Tensor | None = None, *, layers: Sequence[int]
) -> Tensor:
    """Normalised attention inputs [B, K, T, width] of some layers of the teacher."""
    found: list[Tensor] = []

    def keep(view: LayerView) -> None:
        found.append(view.x)

    with observing(teacher, keep, layers=dict.fromkeys(layers), attention_mask=attention_mask):
        teacher.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return torch.stack(found, 1)


class LayerDistiller(nn.Module):
    """The shared attention modules of a student beside frozen copies of the teacher's.

    Args:
        teacher: The unconverted model.
        student: What it was converted into; its attention modules are shared with this module, not copied.
    """

    def __init__(self, teacher: Any, student: Any) -> None:
        super().__init__()
        check_supported(teacher)
        self.config = teacher.config
        self.spec: LisaSpec = student.base_model.lisa
        self.sources = sources(self.spec, self.config.num_hidden_layers)
        self.layers = recorded_layers(self.spec, self.config.num_hidden_layers)
        full, shared = teacher.base_model.layers, student.base_model.layers
        self.teachers = nn.ModuleDict({str(i): copy.deepcopy(full[i].self_attn) for i in self.layers})
        self.students = nn.ModuleDict({str(i): shared[i].self_attn for i in self.sources})
        self.rotary_emb = copy.deepcopy(teacher.base_model.rotary_emb)
        self._kinds = layer_kinds(self.config)
        for parameter in self.teachers.parameters():
            parameter.requires_grad_(False)
        for name, parameter in self.students.named_parameters():
            parameter.requires_grad_(is_lisa_parameter(f".self_attn.{name.partition('.')[2]}"))

    def forward(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        *,
        weights: LocalWeights | None = None,
        reduction: Reduction = "mean",
    ) -> dict[int, Tensor]:
        """Loss of each shared layer.

        Args:
            inputs: What `record_inputs` made for `self.layers`.
            attention_mask: [B, T].
            weights: Of the losses.
            reduction: Over query rows.
        """
        weights = weights or LocalWeights()
        positions = torch.arange(inputs.shape[2], device=inputs.device)[None]
        rotary = self.rotary_emb(inputs, position_ids=positions)
        rows = visible_rows(attention_mask, inputs[:, 0])
        losses = {}
        for i, source in self.sources.items():
            x, below = (inputs[:, self.layers.index(j)] for j in (i, source))
            mask = explicit_mask(
                self.config,
                self._kinds[i],
                inputs_embeds=x,
                attention_mask=attention_mask,
                position_ids=positions,
            )
            step = Step(rotary, positions, mask)
            with torch.no_grad():
                below_scores, _ = self._teach(source, below, step)
                target, output = self._teach(i, x, step)
            student = cast(SharedAttention, self.students[str(i)])
            given = attention_weights(below_scores, mask) if self.spec.stage == "weights" else below_scores
            mine, p, scores = student(x, given, step)
            losses[i] = self._loss(target, scores, output, mine, p, mask, rows, weights, reduction)
        return losses

    def _teach(self, layer: int, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The teacher's scores and output at one layer."""
        attention: Any = self.teachers[str(layer)]
        q, k = queries_and_keys(attention, x, step.position_embeddings)
        scores = full_scores(q, k, attention.scaling)
        v = attention.v_proj(x).view(*x.shape[:2], -1, attention.head_dim).transpose(1, 2)
        return scores, attention.o_proj(weighted_values(attention_weights(scores, step.mask), v))

    def _loss(
        self,
        target: Tensor,
        scores: Tensor,
        output: Tensor,
        mine: Tensor,
        p: Tensor,
        mask: Tensor | None,
        rows: Tensor,
        weights: LocalWeights,
        reduction: Reduction,
    ) -> Tensor:
        if mask is None:
            mask = torch.ones_like(scores[:, :1], dtype=torch.bool)
        if self.spec.stage == "weights":
            # Aligned weights are no distribution; their logarithm makes the nearest one comparable.
            scores = p.clamp(min=torch.finfo(p.dtype).tiny).log()
        total = scores.new_zeros(())
        if weights.kl:
            total = total + weights.kl * attention_kl(target, scores, mask, rows, reduction=reduction)
        if weights.mse_scores:
            total = total + weights.mse_scores * score_mse(target, scores, mask, rows, reduction=reduction)
        if weights.mse_out:
            total = total + weights.mse_out * output_mse(output, mine, rows, reduction=reduction)
        return total
