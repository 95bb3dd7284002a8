"""The two stacked encoders with their CTC heads (spec 4.8), shared by the model and its autoregressive sibling.

Shapes: B clips, T feature frames, F features, S frames after subsampling, D width, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eagleray.models.nast.attention import relative_offsets
from eagleray.models.nast.config import NastConfig
from eagleray.models.nast.curriculum import Oracle
from eagleray.models.nast.layers import (
    AcousticTransformerLayer,
    ConformerLayer,
    TextualLayer,
)
from eagleray.models.nast.prediction import CtcHead, InnerPredictions, PredictionAdapter
from eagleray.models.nast.subsampler import Conv1dSubsampler, Conv2dSubsampler, keep_mask


@dataclass
class Prediction:
    """CTC logits of one layer, with lengths of their own: a progressive encoder is longer further down."""

    logits_BSV: Tensor
    lengths_B: Tensor


DrawOracle = Callable[[Prediction], Oracle]
"""What the textual encoder is told, drawn from the top target prediction that it makes without being told."""


@dataclass
class NastOutput:
    """What the encoders give."""

    source: Prediction
    """Top of the acoustic encoder."""
    target: Prediction
    """Top of the textual encoder."""
    inner_source: dict[int, Prediction]
    """By acoustic layer."""
    inner_target: dict[int, Prediction]
    """By textual layer."""
    hidden_BSD: Tensor
    """What the top target head reads."""

    @property
    def source_logits(self) -> Tensor:
        """Top source logits [B, S, V]."""
        return self.source.logits_BSV

    @property
    def target_logits(self) -> Tensor:
        """Top target logits [B, S, V]."""
        return self.target.logits_BSV

    @property
    def lengths(self) -> Tensor:
        """Frames [B] of the top logits."""
        return self.target.lengths_B


class AcousticEncoder(nn.Module):
    """Subsampling and Conformer layers; one stage, or several with a convolution before each (PDS)."""

    def __init__(self, config: NastConfig) -> None:
        super().__init__()
        strides = config.all_strides
        stages = [strides] if config.subsampling == "convolution" else [(stride,) for stride in strides]
        self.stage_layers = config.acoustic_layers // len(stages)
        first = Conv2dSubsampler if config.subsampler == "conv2d" else Conv1dSubsampler
        self.subsamplers = nn.ModuleList(
            (Conv1dSubsampler if number else first)(
                features=config.width if number else config.feature_size,
                inner_width=config.subsampler_width,
                width=config.width,
                strides=stage,
                dropout=config.dropout,
                mask_between=not config.compat_unmasked_subsampler,
            )
            for number, stage in enumerate(stages)
        )
        self.layers = nn.ModuleList(_acoustic_layer(config) for _ in range(config.acoustic_layers))
        self.norm = nn.LayerNorm(config.width)
        self.inner = InnerPredictions(
            config.inner_source_layers,
            kind=config.source_prediction if config.inner_source_layers else "none",
            from_normalised=config.prediction_from_normalised,
            width=config.width,
            vocab_size=config.source_vocab_size or config.vocab_size,
            pad_id=config.pad_token_id,
        )

    def forward(
        self, x_BSD: Tensor, lengths_B: Tensor, head: CtcHead
    ) -> tuple[Tensor, Tensor, dict[int, Prediction]]:
        """Normalised states, their lengths and the inner predictions."""
        predictions: dict[int, Prediction] = {}
        keep_BS, offsets = torch.empty(0), torch.empty(0)
        for number, layer in enumerate(self.layers, start=1):
            if (number - 1) % self.stage_layers == 0:
                x_BSD, lengths_B = self.subsamplers[(number - 1) // self.stage_layers](x_BSD, lengths_B)
                keep_BS = keep_mask(lengths_B, x_BSD.shape[1])
                offsets = relative_offsets(x_BSD.shape[1], x_BSD)
            x_BSD = layer(x_BSD, keep_BS, offsets)
            if str(number) in self.inner.norms:
                x_BSD, logits = self.inner(number, x_BSD, head)
                predictions[number] = Prediction(logits, lengths_B)
        return self.norm(x_BSD), lengths_B, predictions


class TextualEncoder(nn.Module):
    """Transformer layers without positions; those above `cross_layer_source` attend to its output."""

    def __init__(self, config: NastConfig) -> None:
        super().__init__()
        self.source_layer = config.cross_layer_source
        self.layers = nn.ModuleList(
            TextualLayer(
                width=config.width,
                heads=config.heads,
                inner_width=config.inner_width,
                dropout=config.dropout,
                cross_layer=self.source_layer is not None and number > self.source_layer,
                drop_net=config.drop_net,
            )
            for number in range(1, config.textual_layers + 1)
        )
        self.norm = nn.LayerNorm(config.width)
        self.low_norm = nn.LayerNorm(config.width) if self.source_layer is not None else None
        self.inner = InnerPredictions(
            config.inner_target_layers,
            kind=config.target_prediction if config.inner_target_layers else "none",
            from_normalised=config.prediction_from_normalised,
            width=config.width,
            vocab_size=config.vocab_size,
            pad_id=config.pad_token_id,
        )

    def forward(
        self, x_BSD: Tensor, lengths_B: Tensor, head: CtcHead, draw_oracle: DrawOracle | None = None
    ) -> tuple[Tensor, Prediction, dict[int, Prediction]]:
        """Normalised states, the top prediction and the inner ones; these are told what `draw_oracle` draws."""
        oracle = None
        if draw_oracle is not None:
            # Paper: the reference runs the acoustic encoder a second time too, with other dropout.
            with torch.no_grad():
                untold_BSD, _ = self._encode(x_BSD, lengths_B, head, None)
                oracle = draw_oracle(Prediction(head(untold_BSD), lengths_B))
        hidden_BSD, predictions = self._encode(x_BSD, lengths_B, head, oracle)
        return hidden_BSD, Prediction(head(hidden_BSD), lengths_B), predictions

    def _encode(
        self, x_BSD: Tensor, lengths_B: Tensor, head: CtcHead, oracle: Oracle | None
    ) -> tuple[Tensor, dict[int, Prediction]]:
        keep_BS = keep_mask(lengths_B, x_BSD.shape[1])
        predictions: dict[int, Prediction] = {}
        low_BSD = None
        for number, layer in enumerate(self.layers, start=1):
            x_BSD = layer(x_BSD, keep_BS, low_BSD)
            if number == self.source_layer and self.low_norm is not None:
                low_BSD = self.low_norm(x_BSD)
            if str(number) in self.inner.norms:
                x_BSD, logits = self.inner(number, x_BSD, head, oracle)
                predictions[number] = Prediction(logits, lengths_B)
        return self.norm(x_BSD), predictions


class StackedEncoder(nn.Module):
    """Acoustic encoder, source head, adapter, textual encoder, target head."""

    def __init__(self, config: NastConfig) -> None:
        super().__init__()
        source_vocab = config.source_vocab_size or config.vocab_size
        shared = {"width": config.width, "pad_id": config.pad_token_id}
        self.acoustic = AcousticEncoder(config)
        self.source_head = CtcHead(vocab_size=source_vocab, dropout=config.dropout, **shared)
        self.adapter = PredictionAdapter(kind=config.adapter, vocab_size=source_vocab, **shared)
        self.textual = TextualEncoder(config)
        self.target_head = CtcHead(vocab_size=config.vocab_size, dropout=config.dropout, **shared)

    def forward(
        self, features_BTF: Tensor, lengths_B: Tensor, *, draw_oracle: DrawOracle | None = None
    ) -> NastOutput:
        x_BTF = features_BTF.to(self.source_head.weight.dtype)
        h_BSD, lengths_B, inner_source = self.acoustic(x_BTF, lengths_B, self.source_head)
        source_logits = self.source_head(h_BSD)
        x_BSD = self.adapter(h_BSD, source_logits)
        hidden_BSD, target, inner_target = self.textual(x_BSD, lengths_B, self.target_head, draw_oracle)
        return NastOutput(
            source=Prediction(source_logits, lengths_B),
            target=target,
            inner_source=inner_source,
            inner_target=inner_target,
            hidden_BSD=hidden_BSD,
        )


def _acoustic_layer(config: NastConfig) -> nn.Module:
    sizes = {"width": config.width, "heads": config.heads, "inner_width": config.inner_width}
    if config.acoustic_block == "transformer":
        return AcousticTransformerLayer(**sizes, dropout=config.dropout)
    return ConformerLayer(
        **sizes,
        kernel=config.conv_kernel,
        dropout=config.dropout,
        conv_activation=config.conv_activation,
        conv_norm=config.conv_norm,
    )
