"""The attention term of phase B: the layers of a whole student attend as the teacher's do.

    L = language model + λ_kd τ² KL(teacher logits ‖ student logits) + λ_attn Σ_l KL(P_l of the teacher ‖ P_l of the student)

Unlike in phase A every shared layer works on the scores that the student's own chain hands it. The student's scores are
kept while it runs, which autograd does anyway; the teacher's are compared layer by layer and dropped.

Shapes: B sequences, H heads, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eagleray.models.lisa.layers import SharedAttention
from eagleray.models.lisa.losses import Reduction, attention_kl
from eagleray.models.lisa.teacher import LayerView, observing


@contextmanager
def recording_scores(student: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Forward passes inside the block leave the scores [B, H, T, T] of each shared layer in the dictionary.

    The student may be wrapped (by an engine, by adapters) and may checkpoint its layers. Scores are unmasked and carry
    gradients; of a student that shares attention weights they are the logarithms of these.
    """
    found: dict[int, Tensor] = {}

    def keep(module: Any, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, weights, scores = output
        if module.stage == "weights":
            scores = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
        found[module.layer_idx] = scores

    handles = [m.register_forward_hook(keep) for m in student.modules() if isinstance(m, SharedAttention)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def teach(
    teacher: Any,
    input_ids: Tensor,
    scores: Mapping[int, Tensor],
    rows: Tensor,
    *,
    reduction: Reduction = "mean",
) -> tuple[Tensor, dict[int, Tensor]]:
    """One pass of the teacher: its logits [B, T, V], and the distance of its attention rows from the student's.

    Args:
        teacher: The unconverted model.
        input_ids: [B, T].
        scores: What `recording_scores` found; none: the teacher gives its logits only.
        rows: Tokens that are no padding [B, T].
        reduction: Over query rows; heads are averaged.

    Returns:
        Logits without a gradient; KL(teacher ‖ student) of each layer, with the gradient of its scores.
    """
    losses: dict[int, Tensor] = {}

    def compare(view: LayerView) -> None:
        with torch.enable_grad():
            losses[view.index] = attention_kl(
                view.scores, scores[view.index], view.mask, rows, reduction=reduction
            )

    with observing(teacher, compare, layers=dict.fromkeys(scores), attention_mask=rows):
        logits = teacher(input_ids=input_ids, attention_mask=rows, use_cache=False).logits
    return logits, losses
