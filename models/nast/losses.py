"""Losses: CTC on source and target, at the top and inside (spec 5), with curriculum mixing (spec 6).

    L = w_s CTC(src top) + w_is mean CTC(src inner) + w_t CTC(tgt top) + w_it mean CTC(tgt inner)

Each CTC is a *sum* over the clips, in float32. The training loop divides by the number of target pieces, each with
one `</s>`, of the global batch. A clip too short for its labels has zero loss and zero gradient; `required_frames`
and `metrics.infeasible_share` tell how many there are.

Shapes: B clips, T feature frames, F features, S frames of logits, U labels, V tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eagleray.models.nast.alignment import align
from eagleray.models.nast.curriculum import Mixing, Oracle, draw_oracle
from eagleray.models.nast.encoder import DrawOracle, NastOutput, Prediction

if TYPE_CHECKING:
    from eagleray.models.nast.autoregressive import AutoregressiveModel
    from eagleray.models.nast.model import NastModel, SpeechModel


@dataclass(frozen=True)
class LossWeights:
    """Weights of the CTC terms."""

    source: float = 1.0
    target: float = 1.0
    inner_source: float = 1.0
    inner_target: float = 1.0


SIBLING_WEIGHTS = LossWeights(source=0.2, target=0.2, inner_source=0.1, inner_target=0.1)
"""Of the autoregressive recipe, beside a cross-entropy of weight 1."""


def ctc_sum(
    logits_BSV: Tensor,
    lengths_B: Tensor,
    labels_BU: Tensor,
    label_lengths_B: Tensor,
    *,
    blank_id: int = 0,
    zero_infinity: bool = True,
) -> Tensor:
    """Sum over the batch of −log P(labels), float32 or better.

    Args:
        logits_BSV: Logits; padding frames are not read.
        lengths_B: Frames of each clip.
        labels_BU: Labels without blanks and without `</s>`.
        label_lengths_B: Labels of each clip, may be 0.
        blank_id: The blank.
        zero_infinity: Give clips that are too short for their labels zero loss and gradient instead of infinity.

    >>> A = torch.tensor([[[.6, .3, .1], [.5, .2, .3], [.4, .1, .5], [.7, .2, .1]]]).double().log()
    >>> round(ctc_sum(A, torch.tensor([4]), torch.tensor([[1, 2]]), torch.tensor([2])).item(), 6)
    1.55495
    """
    return _LabelCtc.apply(logits_BSV, lengths_B, labels_BU, label_lengths_B, blank_id, zero_infinity)


class _LabelCtc(torch.autograd.Function):
    """CTC on the few columns of logits that a clip's labels need; the rest of the vocabulary enters by its normaliser.

    The gradient by logits is the softmax less each label's share of the paths, so nothing of the size of the
    vocabulary is kept for the backward pass but the logits, and it makes one pass over them.

    Further shapes: K = 1 + U columns, the blank first.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_BSV: Tensor,
        lengths_B: Tensor,
        labels_BU: Tensor,
        label_lengths_B: Tensor,
        blank_id: int,
        zero_infinity: bool,
    ) -> Tensor:
        ctx.dtype = torch.promote_types(logits_BSV.dtype, torch.float32)
        padding_BU = torch.arange(labels_BU.shape[1], device=labels_BU.device) >= label_lengths_B[:, None]
        columns_BK = F.pad(labels_BU.long().masked_fill(padding_BU, blank_id), (1, 0), value=blank_id)
        # A label that comes again uses the column of its first time, as CTC wants a blank between equal neighbours.
        places_BU = (columns_BK[:, 1:, None] == columns_BK[:, None, :]).byte().argmax(-1)
        columns_BSK = columns_BK[:, None].expand(-1, logits_BSV.shape[1], -1)
        log_probs_BSK = logits_BSV.log_softmax(-1, dtype=ctx.dtype).gather(-1, columns_BSK)
        needs_gradient = ctx.needs_input_grad[0]
        # cuDNN's CTC has other rules for lengths and dtypes and is not deterministic.
        with torch.set_grad_enabled(needs_gradient), torch.backends.cudnn.flags(enabled=False):
            log_probs_BSK.requires_grad_(needs_gradient)
            losses_B = F.ctc_loss(
                log_probs_BSK.transpose(0, 1),
                places_BU,
                lengths_B.long(),
                label_lengths_B.long(),
                reduction="none",
            )
            total = losses_B.sum()
        counts_B = losses_B.isfinite() if zero_infinity else torch.ones_like(losses_B, dtype=torch.bool)
        if needs_gradient:
            (gradient_BSK,) = torch.autograd.grad(total, log_probs_BSK)
            # Torch's gradient is probability less share: it takes for granted that a log-softmax came before.
            shares_BSK = log_probs_BSK.detach().exp() - gradient_BSK
            frames_S = torch.arange(logits_BSV.shape[1], device=logits_BSV.device)
            used_BS1 = ((frames_S < lengths_B[:, None]) & counts_B[:, None])[..., None]
            ctx.save_for_backward(logits_BSV, columns_BSK, torch.where(used_BS1, shares_BSK, 0.0), used_BS1)
        return torch.where(counts_B, losses_B.detach(), 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        logits_BSV, columns_BSK, shares_BSK, used_BS1 = ctx.saved_tensors
        found_BSV = logits_BSV.softmax(-1, dtype=ctx.dtype).mul_(used_BS1)
        found_BSV.scatter_add_(-1, columns_BSK, -shares_BSK).mul_(grad_outputs[0])
        return found_BSV.to(logits_BSV.dtype), None, None, None, None, None


def ctc_terms(
    output: NastOutput,
    source_BU: Tensor,
    source_lengths_B: Tensor,
    target_BU: Tensor,
    target_lengths_B: Tensor,
    *,
    blank_id: int = 0,
) -> dict[str, Tensor]:
    """The four terms of the loss, unweighted; inner ones are means over their layers, and absent without any."""

    source, target = (source_BU, source_lengths_B), (target_BU, target_lengths_B)
    terms = {
        "source": mean_ctc([output.source], *source, blank_id=blank_id),
        "target": mean_ctc([output.target], *target, blank_id=blank_id),
    }
    if output.inner_source:
        terms["inner_source"] = mean_ctc(output.inner_source.values(), *source, blank_id=blank_id)
    if output.inner_target:
        terms["inner_target"] = mean_ctc(output.inner_target.values(), *target, blank_id=blank_id)
    return terms


def mean_ctc(
    predictions: Iterable[Prediction], labels_BU: Tensor, label_lengths_B: Tensor, *, blank_id: int = 0
) -> Tensor:
    """Mean over predictions of the batch's summed CTC."""
    losses = [
        ctc_sum(p.logits_BSV, p.lengths_B, labels_BU, label_lengths_B, blank_id=blank_id) for p in predictions
    ]
    return torch.stack(losses).mean()


def nast_loss(
    model: NastModel,
    features_BTF: Tensor,
    lengths_B: Tensor,
    source_BU: Tensor,
    source_lengths_B: Tensor,
    target_BU: Tensor,
    target_lengths_B: Tensor,
    *,
    weights: LossWeights | None = None,
    mixing: Mixing | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss of a batch and its unweighted terms, detached; a batch's weight is Σ (target length + 1).

    Args:
        model: The model; in evaluation mode there is no mixing.
        features_BTF: Features, padded on the right.
        lengths_B: Frames of each clip.
        source_BU: Pieces of the transcripts, without `</s>`.
        source_lengths_B: Pieces of each transcript.
        target_BU: Pieces of the translations, without `</s>`.
        target_lengths_B: Pieces of each translation.
        weights: Weights of the terms; default: all 1.
        mixing: Curriculum mixing; default: that of the paper.
        generator: Source of the mixing's draws, on the device of the model; default: torch's own.
    """
    oracle = oracle_of(model, target_BU, target_lengths_B, mixing or Mixing(), generator)
    output = model(features_BTF, lengths_B, draw_oracle=oracle)
    labels = (source_BU, source_lengths_B, target_BU, target_lengths_B)
    terms = ctc_terms(output, *labels, blank_id=model.config.blank_token_id)
    return weighted_sum(terms, weights or LossWeights()), _detached(terms)


def autoregressive_loss(
    model: AutoregressiveModel,
    features_BTF: Tensor,
    lengths_B: Tensor,
    source_BU: Tensor,
    source_lengths_B: Tensor,
    target_BU: Tensor,
    target_lengths_B: Tensor,
    *,
    weights: LossWeights | None = None,
    mixing: Mixing | None = None,
    label_smoothing: float = 0.1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Label-smoothed cross-entropy plus the weighted CTC terms; arguments and results as in `nast_loss`.

    The defaults are those of the recipe: `SIBLING_WEIGHTS` and a mixing ratio of 0.5.
    """
    mixing = mixing or Mixing(ratio=0.5)
    oracle = oracle_of(model, target_BU, target_lengths_B, mixing, generator)
    output, logits_BUV = model(features_BTF, lengths_B, target_BU, target_lengths_B, draw_oracle=oracle)
    expected_BU = model.with_end(target_BU, target_lengths_B)
    cross_entropy = F.cross_entropy(
        logits_BUV.float().flatten(0, 1),
        expected_BU.flatten(),
        ignore_index=model.config.pad_token_id,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    labels = (source_BU, source_lengths_B, target_BU, target_lengths_B)
    terms = ctc_terms(output, *labels, blank_id=model.config.blank_token_id)
    total = cross_entropy + weighted_sum(terms, weights or SIBLING_WEIGHTS)
    return total, _detached({"cross_entropy": cross_entropy, **terms})


def oracle_of(
    model: SpeechModel,
    target_BU: Tensor,
    target_lengths_B: Tensor,
    mixing: Mixing,
    generator: torch.Generator | None,
) -> DrawOracle | None:
    """Best paths of the targets under a first prediction, and the draw; none where nothing can be told."""
    config = model.config
    unused = not config.inner_target_layers or config.target_prediction in ("none", "linear")
    if not model.training or not mixing.ratio or unused:
        return None

    def draw(top: Prediction) -> Oracle:
        logits_BSV, lengths_B = top.logits_BSV, top.lengths_B
        paths = align(logits_BSV, lengths_B, target_BU, target_lengths_B, blank_id=config.blank_token_id)
        return draw_oracle(logits_BSV, lengths_B, paths, mixing, generator=generator)

    return draw


def weighted_sum(terms: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """Sum of the terms, each times its weight."""
    return torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()


def _detached(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: term.detach() for name, term in terms.items()}
