"""Curriculum mixing: part of the frames are told the best alignment instead of what the model predicts (spec 6).

A first pass without gradient gives logits z; `align` finds the best CTC path of the translation under them. Frames
where the arg-max disagrees with the path are mistakes, and a draw decides which of them are told the path in the
second pass. Fewer mistakes mean less help, so the curriculum needs no schedule; `decayed_ratio` is there for one.

Shapes: B clips, S frames, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eagleray.models.nast.alignment import Alignment
from eagleray.models.nast.subsampler import keep_mask


@dataclass(frozen=True)
class Mixing:
    """How much of the oracle training sees."""

    ratio: float = 0.8
    """Chance that a frame is told its label; 0 turns mixing off."""
    only_mistakes: bool = True
    """Tell only frames that predict something else."""
    adaptive: bool = False
    """Multiply the ratio by the clip's share of mistakes."""
    smoothing: float = 0.1
    """Mass of the oracle that is spread over all tokens."""

    def __post_init__(self) -> None:
        for name, value in (("ratio", self.ratio), ("smoothing", self.smoothing)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"`{name}` is {value}; it must be in [0, 1].")


@dataclass(frozen=True)
class Oracle:
    """What the second pass is told."""

    labels_BS: Tensor
    """Label of each frame on the best path, the blank in padding."""
    told_BS: Tensor
    """Frames that are told."""
    smoothing: float

    def __post_init__(self) -> None:
        assert self.labels_BS.shape == self.told_BS.shape


def find_mistakes(logits_BSV: Tensor, lengths_B: Tensor, alignment: Alignment) -> Tensor:
    """Frames [B, S] whose arg-max is not the label on the best path; never padding.

    A clip too short for its translation has no path, and so no mistakes: it is not mixed (spec 14, defect 8).
    """
    real_BS = keep_mask(lengths_B, logits_BSV.shape[1]) & alignment.feasible_B[:, None]
    return (logits_BSV.argmax(-1) != alignment.labels_BS) & real_BS


def draw_oracle(
    logits_BSV: Tensor,
    lengths_B: Tensor,
    alignment: Alignment,
    mixing: Mixing,
    *,
    generator: torch.Generator | None = None,
) -> Oracle:
    """Draw the frames that are told their label.

    Args:
        logits_BSV: Top logits of the first pass.
        lengths_B: Frames of each clip.
        alignment: Best paths under these logits.
        mixing: Which frames, and how often.
        generator: Source of the draw, on the device of the logits; default: torch's own.
    """
    mistakes_BS = find_mistakes(logits_BSV, lengths_B, alignment)
    draw_BS = torch.rand(mistakes_BS.shape, generator=generator, device=logits_BSV.device)
    rate_B = torch.full_like(draw_BS[:, 0], mixing.ratio)
    if mixing.adaptive:
        rate_B = rate_B * mistakes_BS.sum(1) / lengths_B
    told_BS = draw_BS < rate_B[:, None]
    if mixing.only_mistakes:
        told_BS = told_BS & mistakes_BS
    else:
        told_BS = told_BS & keep_mask(lengths_B, told_BS.shape[1]) & alignment.feasible_B[:, None]
    return Oracle(alignment.labels_BS, told_BS, mixing.smoothing)


def mix_oracle(p_BSV: Tensor, oracle: Oracle) -> Tensor:
    """P with the rows of told frames replaced by (1 − ε) one-hot + ε/V."""
    vocab_size = p_BSV.shape[-1]
    told = torch.full_like(p_BSV, oracle.smoothing / vocab_size)
    told.scatter_(-1, oracle.labels_BS[..., None], 1.0 - oracle.smoothing + oracle.smoothing / vocab_size)
    return torch.where(oracle.told_BS[..., None], told, p_BSV)


def decayed_ratio(step: int, *, start: int, end: int, first: float, last: float) -> float:
    """A ratio that falls (or rises) linearly between two steps; the released recipe does not use it.

    >>> round(decayed_ratio(30_000, start=20_000, end=40_000, first=0.8, last=0.0), 6)
    0.4
    """
    if start >= end:
        raise ValueError(f"`start` is {start} and `end` is {end}; `end` must be larger.")
    progress = min(max((step - start) / (end - start), 0.0), 1.0)
    return first + (last - first) * progress
