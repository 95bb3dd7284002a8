"""Layers of the encoders: Conformer and Transformer blocks, the convolution module, cross-layer attention.

All are pre-norm. Masks keep what is true. Shapes: B clips, S frames, D width, C channels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from transformers.modeling_layers import GradientCheckpointingLayer

from eagleray.models.nast.attention import CrossAttention, KeyValue, RelativeSelfAttention, SelfAttention

Activation = Literal["relu", "swish"]
_ACTIVATIONS = {"relu": F.relu, "swish": F.silu}


class FeedForward(nn.Module):
    """W2 drop(f(W1 x)), then dropout."""

    def __init__(self, *, width: int, inner_width: int, dropout: float, activation: Activation) -> None:
        super().__init__()
        self.inner = nn.Linear(width, inner_width)
        self.output = nn.Linear(inner_width, width)
        self.activation, self.dropout = _ACTIVATIONS[activation], dropout

    def forward(self, x_BSD: Tensor) -> Tensor:
        hidden = F.dropout(self.activation(self.inner(x_BSD)), self.dropout, self.training)
        return F.dropout(self.output(hidden), self.dropout, self.training)


class MaskedBatchNorm(nn.Module):
    """BatchNorm over the real frames of the global batch.

    Statistics leave padding out, so the length of the longest clip does not matter, and are summed over all workers in
    one all-reduce, so every worker holds the same running statistics and a batch split over workers has the same
    gradient. Paper: the reference counts padded zeros and keeps statistics of each worker apart.
    """

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, channels: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_variance", torch.ones(channels))
        self.momentum, self.eps = momentum, eps

    def forward(self, x_BSC: Tensor, keep_BS: Tensor) -> Tensor:
        if self.training:
            mean, variance = self._batch_statistics(x_BSC, keep_BS)
        else:
            mean, variance = self.running_mean, self.running_variance
        scale = self.weight.float() * torch.rsqrt(variance.float() + self.eps)
        shift = self.bias.float() - mean.float() * scale
        return torch.addcmul(shift.to(x_BSC.dtype), x_BSC, scale.to(x_BSC.dtype))

    def _batch_statistics(self, x_BSC: Tensor, keep_BS: Tensor) -> tuple[Tensor, Tensor]:
        real = x_BSC.float() * keep_BS[..., None]
        sums = torch.cat([real.sum((0, 1)), real.square().sum((0, 1)), keep_BS.sum()[None].float()])
        if dist.is_initialized() and dist.get_world_size() > 1:
            sums = all_reduce(sums)
        channels, count = len(self.weight), sums[-1]
        mean = sums[:channels] / count
        variance = (sums[channels:-1] / count - mean.square()).clamp_min(0.0)
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp_min(1.0))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_variance.lerp_(unbiased.to(self.running_variance.dtype), self.momentum)
        return mean, variance


class DepthwiseConvolution(nn.Conv1d):
    """Each channel over time for itself, [B, S, D] to [B, S, D].

    It is done on a picture one frame high, whose channels lie innermost as ours do. Over one dimension torch knows no such
    layout, and on a CPU takes up to 20 times as long, about 3 to 5 times with the gradient.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__(width, width, kernel, padding=kernel // 2, groups=width, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:  # type: ignore[override]
        x_BD1S, weight_D11K = x_BSD.transpose(1, 2)[:, :, None], self.weight[:, :, None]
        x_BD1S = F.conv2d(x_BD1S, weight_D11K, padding=(0, self.padding[0]), groups=self.groups)  # type: ignore[arg-type]
        return x_BD1S[:, :, 0].transpose(1, 2)


class ConvolutionModule(nn.Module):
    """Pointwise, GLU, depthwise, norm, activation, pointwise; padding is zeroed before the depthwise part.

    Paper: the activation is ReLU, since the reference reads it from the option of the whole model, which is relu.
    """

    def __init__(
        self,
        *,
        width: int,
        kernel: int,
        dropout: float,
        activation: Activation,
        norm: Literal["batch_norm", "layer_norm"],
    ) -> None:
        super().__init__()
        self.input = nn.Linear(width, 2 * width, bias=False)
        self.depthwise = DepthwiseConvolution(width, kernel)
        self.norm = MaskedBatchNorm(width) if norm == "batch_norm" else nn.LayerNorm(width)
        self.output = nn.Linear(width, width, bias=False)
        self.activation, self.dropout = _ACTIVATIONS[activation], dropout

    def forward(self, x_BSD: Tensor, keep_BS: Tensor) -> Tensor:
        # Neither the pointwise part nor GLU has a bias, so frames that were zero before are zero after them.
        x_BSD = F.glu(self.input(x_BSD * keep_BS[..., None]))
        x_BSD = self.depthwise(x_BSD)
        if isinstance(self.norm, MaskedBatchNorm):
            x_BSD = self.norm(x_BSD, keep_BS)
        else:
            x_BSD = self.norm(x_BSD)
        return F.dropout(self.output(self.activation(x_BSD)), self.dropout, self.training)


class ConformerLayer(GradientCheckpointingLayer):
    """Half FFN, relative self-attention, convolution, half FFN, LayerNorm (spec 4.3)."""

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        inner_width: int,
        kernel: int,
        dropout: float,
        conv_activation: Activation,
        conv_norm: Literal["batch_norm", "layer_norm"],
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.feed_forwards = nn.ModuleList(
            FeedForward(width=width, inner_width=inner_width, dropout=dropout, activation="swish")
            for _ in range(2)
        )
        self.attention = RelativeSelfAttention(width=width, heads=heads, dropout=dropout)
        self.convolution = ConvolutionModule(
            width=width, kernel=kernel, dropout=dropout, activation=conv_activation, norm=conv_norm
        )

    def forward(self, x_BSD: Tensor, keep_BS: Tensor, offsets_PD: Tensor) -> Tensor:
        first, attention, convolution, second, final = self.norms
        x_BSD = x_BSD + 0.5 * self.feed_forwards[0](first(x_BSD))
        attended = self.attention(attention(x_BSD), keep_BS[:, None, None], offsets_PD=offsets_PD)
        x_BSD = x_BSD + F.dropout(attended, self.dropout, self.training)
        x_BSD = x_BSD + self.convolution(convolution(x_BSD), keep_BS)
        x_BSD = x_BSD + 0.5 * self.feed_forwards[1](second(x_BSD))
        return final(x_BSD)


class AcousticTransformerLayer(GradientCheckpointingLayer):
    """The plain alternative to `ConformerLayer`: relative self-attention and one FFN."""

    def __init__(self, *, width: int, heads: int, inner_width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = RelativeSelfAttention(width=width, heads=heads, dropout=dropout)
        self.feed_forward = FeedForward(
            width=width, inner_width=inner_width, dropout=dropout, activation="relu"
        )

    def forward(self, x_BSD: Tensor, keep_BS: Tensor, offsets_PD: Tensor) -> Tensor:
        attended = self.attention(self.norms[0](x_BSD), keep_BS[:, None, None], offsets_PD=offsets_PD)
        x_BSD = x_BSD + F.dropout(attended, self.dropout, self.training)
        return x_BSD + self.feed_forward(self.norms[1](x_BSD))


class TextualLayer(GradientCheckpointingLayer):
    """Self-attention without positions, optionally attention to a lower layer's output, and FFN (spec 4.7).

    Args:
        width: Width D.
        heads: Heads of each attention.
        inner_width: Width inside the FFN.
        dropout: Dropout.
        cross_layer: Attend to the output of a lower layer, after self-attention.
        drop_net: Chance that training skips the self-attention branch of such a layer, for the whole batch.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        inner_width: int,
        dropout: float,
        cross_layer: bool = False,
        drop_net: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout, self.drop_net = dropout, drop_net if cross_layer else 0.0
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if cross_layer else 2))
        self.attention = SelfAttention(width=width, heads=heads, dropout=dropout)
        self.cross_attention = (
            CrossAttention(width=width, heads=heads, dropout=dropout) if cross_layer else None
        )
        self.feed_forward = FeedForward(
            width=width, inner_width=inner_width, dropout=dropout, activation="relu"
        )

    def forward(self, x_BSD: Tensor, keep_BS: Tensor, low_BSD: Tensor | None) -> Tensor:
        mask = keep_BS[:, None, None]
        attended = F.dropout(self.attention(self.norms[0](x_BSD), mask), self.dropout, self.training)
        if self.training and self.drop_net:
            # The branch is computed and then zeroed: if it were skipped, workers under ZeRO-3 would gather
            # different weights and wait for each other for ever.
            attended = attended * float(torch.rand(()) >= self.drop_net)
        x_BSD = x_BSD + attended
        if self.cross_attention is not None:
            assert low_BSD is not None
            crossed = self.cross_attention(self.norms[1](x_BSD), low_BSD, mask)
            x_BSD = x_BSD + F.dropout(crossed, self.dropout, self.training)
        return x_BSD + self.feed_forward(self.norms[-1](x_BSD))


class DecoderLayer(GradientCheckpointingLayer):
    """Causal self-attention, attention to the encoder, FFN; with a cache of keys and values in decoding."""

    def __init__(self, *, width: int, heads: int, inner_width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attention = SelfAttention(width=width, heads=heads, dropout=dropout)
        self.cross_attention = CrossAttention(width=width, heads=heads, dropout=dropout)
        self.feed_forward = FeedForward(
            width=width, inner_width=inner_width, dropout=dropout, activation="relu"
        )

    def forward(self, x_BUD: Tensor, encoded_BSD: Tensor, mask: Tensor) -> Tensor:
        """All positions at once, each seeing those before it; `mask` [B, 1, 1, S] is true for real frames."""
        attended = self.attention(self.norms[0](x_BUD), None, causal=True)
        x_BUD = x_BUD + F.dropout(attended, self.dropout, self.training)
        crossed = self.cross_attention(self.norms[1](x_BUD), encoded_BSD, mask)
        x_BUD = x_BUD + F.dropout(crossed, self.dropout, self.training)
        return x_BUD + self.feed_forward(self.norms[2](x_BUD))

    def step(
        self, x_N1D: Tensor, earlier: KeyValue, position: int, memory: KeyValue, mask: Tensor | None
    ) -> Tensor:
        """One more position of N hypotheses; writes its keys and values into `earlier` at `position`.

        Hypotheses of one clip are consecutive and attend to its `memory` [B, H, S, d] as N/B queries, so the memory is
        neither copied nor re-ordered.
        """
        query, own = self.attention.project(self.norms[0](x_N1D))
        earlier.key[:, :, position] = own.key[:, :, 0]
        earlier.value[:, :, position] = own.value[:, :, 0]
        seen = KeyValue(earlier.key[:, :, : position + 1], earlier.value[:, :, : position + 1])
        x_N1D = x_N1D + self.attention.attend(query, seen, None)
        together = self.norms[1](x_N1D).view(len(memory.key), -1, x_N1D.shape[2])
        x_N1D = x_N1D + self.cross_attention.attend(together, memory, mask).view_as(x_N1D)
        return x_N1D + self.feed_forward(self.norms[2](x_N1D))
