"""Shorter sequences from features: strided convolutions that never let padding reach a real frame.

Each convolution has kernel 5 and stride s; it sees zeros beyond the end of *its own* input, as a clip alone in its
batch would. The reference masks only after the last convolution, so there the last frame of a padded clip depends
on the length of its neighbours (spec 14, defect 1); `mask_between=False` reproduces that.

Shapes: B clips, T frames in, S frames out, F features, C channels.
"""

from __future__ import annotations

from typing import TypeVar

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
    """Strided convolutions with GLU, then mask, LayerNorm and dropout (spec 4.2).

    Args:
        features: Width F of the input.
        inner_width: Channels of the first convolutions before their GLU, which halves them.
        width: Channels of the result.
        strides: Stride of each convolution; together they divide the frame rate.
        dropout: Dropout of the result.
        mask_between: Zero the padding before every convolution, not only at the end.
    """

    def __init__(
        self,
        *,
        features: int,
        inner_width: int,
        width: int,
        strides: tuple[int, ...],
        dropout: float,
        mask_between: bool = True,
    ) -> None:
        super().__init__()
        self.strides, self.mask_between = strides, mask_between
        self.convolutions = nn.ModuleList()
        channels = features
        for number, stride in enumerate(strides, start=1):
            out = 2 * width if number == len(strides) else inner_width
            self.convolutions.append(nn.Conv1d(channels, out, KERNEL, stride=stride, padding=KERNEL // 2))
            channels = out // 2
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTF: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Subsampled frames [B, S, C] and their lengths [B]."""
        x_BCT = x_BTF.transpose(1, 2)
        for convolution, stride in zip(self.convolutions, self.strides, strict=True):
            if self.mask_between:
                x_BCT = _zero_padding(x_BCT, lengths_B)
            x_BCT = F.glu(convolution(x_BCT), dim=1)
            lengths_B = subsampled_length(lengths_B, (stride,))
        x_BSC = _zero_padding(x_BCT, lengths_B).transpose(1, 2)
        return self.dropout(self.norm(x_BSC)), lengths_B


def _zero_padding(x_BCT: Tensor, lengths_B: Tensor) -> Tensor:
    return x_BCT.masked_fill(~keep_mask(lengths_B, x_BCT.shape[2])[:, None], 0.0)
