"""Shorter sequences from features: strided convolutions that never let padding reach a real frame.

A convolution of stride s leaves ⌊(n − 1)/s⌋ + 1 of n frames; it sees zeros beyond the end of *its own* input, as a clip alone in its
batch would. The reference masks only after the last convolution, so there the last frame of a padded clip depends
on the length of its neighbours (spec 14, defect 1); `mask_between=False` reproduces that.

Shapes: B clips, T frames in, S frames out, F features, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Length = TypeVar("Length", int, Tensor)

KERNEL = 5


def subsampled_length(frames: Length, strides: tuple[int, ...] = (2, 2)) -> Length:
    """Frames left after convolutions with these strides, ⌊(n − 1)/s⌋ + 1 each; for ints and tensors.

    >>> subsampled_length(1000), subsampled_length(17), subsampled_length(1)
    (250, 5, 1)
    """
    for stride in strides:
        frames = (frames - 1) // stride + 1
    return frames


def keep_mask(lengths_B: Tensor, size: int) -> Tensor:
    """Mask [B, size], true at the first `lengths` positions."""
    return torch.arange(size, device=lengths_B.device) < lengths_B[:, None]


class Subsampler(nn.Module):
    """What the two kinds share: strided convolutions with masks, LayerNorm and dropout of the result.

    Args:
        convolutions: Each sees its input with time as the third dimension.
        strides: Stride of each convolution; together they divide the frame rate.
        width: Channels C of the result.
        dropout: Dropout of the result.
        mask_between: Zero the padding before every convolution, not only at the end.
    """

    def __init__(
        self,
        convolutions: Iterable[nn.Module],
        *,
        strides: tuple[int, ...],
        width: int,
        dropout: float,
        mask_between: bool,
    ) -> None:
        super().__init__()
        self.strides, self.mask_between = strides, mask_between
        self.convolutions = nn.ModuleList(convolutions)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def _convolve(
        self, x: Tensor, lengths_B: Tensor, activation: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """All convolutions, each followed by `activation`; the result is zero beyond the lengths that come with it."""
        for convolution, stride in zip(self.convolutions, self.strides, strict=True):
            if self.mask_between:
                x = _zero_padding(x, lengths_B)
            x = activation(convolution(x))
            lengths_B = subsampled_length(lengths_B, (stride,))
        return _zero_padding(x, lengths_B), lengths_B


class Conv1dSubsampler(Subsampler):
    """Convolutions over time with GLU (spec 4.2); the bins of a frame are their channels.

    Args:
        features: Width F of the input.
        inner_width: Channels of all convolutions but the last before their GLU, which halves them.
        width: Channels C of the result.
        strides: Stride of each convolution.
        **shared: See `Subsampler`.
    """

    def __init__(
        self, *, features: int, inner_width: int, width: int, strides: tuple[int, ...], **shared: Any
    ) -> None:
        outputs = [inner_width] * (len(strides) - 1) + [2 * width]
        inputs = [features, *(channels // 2 for channels in outputs[:-1])]
        convolutions = [
            nn.Conv1d(before, after, KERNEL, stride=stride, padding=KERNEL // 2)
            for before, after, stride in zip(inputs, outputs, strides, strict=True)
        ]
        super().__init__(convolutions, strides=strides, width=width, **shared)

    def forward(self, x_BTF: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Subsampled frames [B, S, C] and their lengths [B]."""
        x_BCS, lengths_B = self._convolve(x_BTF.transpose(1, 2), lengths_B, partial(F.glu, dim=1))
        return self.dropout(self.norm(x_BCS.transpose(1, 2))), lengths_B


class Conv2dSubsampler(Subsampler):
    """Convolutions over time and frequency with ReLU, then a projection of each frame.

    A filter is the same at all frequencies, so it knows a formant at whatever height a voice has it; `Conv1dSubsampler`
    has to see every height in training.

    Args:
        features: Width F of the input.
        inner_width: Channels of the convolutions.
        width: Channels C of the result.
        strides: Stride of each convolution in both directions.
        **shared: See `Subsampler`.
    """

    def __init__(
        self, *, features: int, inner_width: int, width: int, strides: tuple[int, ...], **shared: Any
    ) -> None:
        convolutions = [
            nn.Conv2d(inner_width if number else 1, inner_width, 3, stride=stride, padding=1)
            for number, stride in enumerate(strides)
        ]
        super().__init__(convolutions, strides=strides, width=width, **shared)
        self.projection = nn.Linear(inner_width * subsampled_length(features, strides), width)

    def forward(self, x_BTF: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Subsampled frames [B, S, C] and their lengths [B]."""
        x, lengths_B = self._convolve(x_BTF[:, None], lengths_B, F.relu)
        return self.dropout(self.norm(self.projection(x.transpose(1, 2).flatten(2)))), lengths_B


def _zero_padding(x: Tensor, lengths_B: Tensor) -> Tensor:
    """`x` with zeros beyond the lengths, along its third dimension."""
    keep = keep_mask(lengths_B, x.shape[2]).view(len(x), 1, -1, *[1] * (x.ndim - 3))
    return x.masked_fill(~keep, 0.0)
