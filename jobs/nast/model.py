"""Config sections of the model and its loss: sizes and switches of `NastConfig`, weights, curriculum mixing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from eagleray.models.nast.autoregressive import AutoregressiveModel
from eagleray.models.nast.config import AutoregressiveConfig, NastConfig
from eagleray.models.nast.curriculum import Mixing
from eagleray.models.nast.losses import SIBLING_WEIGHTS, LossWeights, autoregressive_loss, nast_loss
from eagleray.models.nast.model import NastModel, SpeechModel
from eagleray.models.nast.prediction import AdapterKind
from eagleray.platform.config import Config as Section

_CLASSES: dict[str, tuple[type[NastConfig], type[SpeechModel]]] = {
    "nast": (NastConfig, NastModel),
    "autoregressive": (AutoregressiveConfig, AutoregressiveModel),
}


class NastSection(Section):
    """Sizes and switches of a model with random weights; what is not given is the paper's."""

    architecture: Literal["nast", "autoregressive"] = "nast"
    """The paper's model, or its autoregressive sibling with the same acoustic encoder."""
    width: int | None = Field(default=None, ge=4)
    """Hidden size (512)."""
    heads: int | None = Field(default=None, ge=1)
    """Attention heads (8)."""
    inner_width: int | None = Field(default=None, ge=1)
    """Width inside feed-forward networks (2048)."""
    subsampler: Literal["conv1d", "conv2d"] | None = None
    """Convolutions on the features: over time (`conv1d`), or over time and frequency."""
    subsampler_width: int | None = Field(default=None, ge=2)
    """Channels of the first convolution, of `conv1d` before its GLU (2048)."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout everywhere (0.15)."""
    subsampling: Literal["convolution", "progressive"] | None = None
    """All strides before the first layer (`convolution`, the default), or one before each stage of layers."""
    strides: list[int] | None = None
    """Strides of the subsampling ([2, 2]); their product divides the rate of 100 frames a second."""
    acoustic_layers: int | None = Field(default=None, ge=1)
    """Layers of the acoustic encoder (12)."""
    acoustic_block: Literal["conformer", "transformer"] | None = None
    """Kind of acoustic layer (`conformer`)."""
    conv_kernel: int | None = Field(default=None, ge=1)
    """Kernel of the Conformer's convolution, odd (15)."""
    conv_norm: Literal["batch_norm", "layer_norm"] | None = None
    """Norm of that convolution (`batch_norm`)."""
    textual_layers: int | None = Field(default=None, ge=1)
    """Layers of the textual encoder (12; 6 in the sibling)."""
    decoder_layers: int | None = Field(default=None, ge=1)
    """Layers of the sibling's decoder (6)."""
    inner_source_layers: list[int] | None = None
    """Acoustic layers with a source CTC of their own ([6, 9])."""
    inner_target_layers: list[int] | None = None
    """Textual layers with a target CTC of their own ([6, 9]; [4] in the sibling)."""
    source_prediction: AdapterKind | None = None
    """What acoustic layers with CTC are told of their prediction (`inter_league`)."""
    target_prediction: AdapterKind | None = None
    """What textual layers with CTC are told of their prediction (`inter_league`)."""
    adapter: AdapterKind | None = None
    """What the textual encoder is told of the source prediction (`inter_league`)."""
    cross_layer_source: int | None = Field(default=None, ge=0)
    """Textual layer that all higher ones attend to (3; 2 in the sibling); 0: no cross-layer attention."""
    drop_net: float | None = Field(default=None, ge=0, le=1)
    """Chance of leaving out self-attention in layers with cross-layer attention (0.1)."""

    @model_validator(mode="after")
    def _fits_together(self) -> NastSection:
        if self.architecture == "nast" and self.decoder_layers is not None:
            raise ValueError("`model.decoder_layers` is for `model.architecture: autoregressive`")
        self.config(vocab_size=8)
        return self

    def config(self, *, vocab_size: int, source_vocab_size: int | None = None) -> NastConfig:
        """The model's own config.

        Raises:
            ValueError: The sizes do not fit together.
        """
        given = {k: v for k, v in self.model_dump(exclude={"architecture"}).items() if v is not None}
        if given.get("cross_layer_source") == 0:
            given["cross_layer_source"] = None
        sizes: dict[str, Any] = {"vocab_size": vocab_size, "source_vocab_size": source_vocab_size}
        try:
            return _CLASSES[self.architecture][0](**sizes, **given)
        except ValueError as error:
            raise ValueError(f"`model`: {error}") from None

    def build(self, config: NastConfig) -> SpeechModel:
        """The model with random weights."""
        return _CLASSES[self.architecture][1](config)


class CurriculumSection(Section):
    """Curriculum mixing: frames that are told the best alignment in training."""

    ratio: float | None = Field(default=None, ge=0, le=1)
    """Chance that a frame is told its label (paper: 0.8; sibling: 0.5); 0 turns mixing off and saves a pass."""
    only_mistakes: bool = True
    """Tell only frames that predict something else."""
    adaptive: bool = False
    """Multiply the ratio by the utterance's share of mistakes."""
    smoothing: float = Field(default=0.1, ge=0, le=1)
    """Mass of the told label that is spread over all pieces."""

    def mixing(self, *, default: float) -> Mixing:
        """The mixing with these settings; `default` is the ratio where none is given."""
        return Mixing(**{**self.model_dump(), "ratio": default if self.ratio is None else self.ratio})


class LossSection(Section):
    """Weights of the CTC terms; what is not given is the paper's."""

    source: float | None = Field(default=None, ge=0)
    """Source CTC at the top (1; 0.2 in the sibling)."""
    target: float | None = Field(default=None, ge=0)
    """Target CTC at the top (1; 0.2 in the sibling)."""
    inner_source: float | None = Field(default=None, ge=0)
    """Mean source CTC of the inner layers (1; 0.1 in the sibling)."""
    inner_target: float | None = Field(default=None, ge=0)
    """Mean target CTC of the inner layers (1; 0.1 in the sibling)."""
    curriculum: CurriculumSection = CurriculumSection()
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Label smoothing of the sibling's cross-entropy."""

    @property
    def uses_transcripts(self) -> bool:
        """Whether a source term has a weight."""
        return self.source != 0 or self.inner_source != 0

    def compute(self, model: Any, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss of a batch as `SpeechTask` collates it, and its terms; what kind of loss, the model decides."""
        names = ("features", "lengths", "source", "source_lengths", "target", "target_lengths")
        batch = [tensors[name] for name in names]
        batch[0] = batch[0].to(model.dtype)  # features are made in fp32; the weights may be bf16
        if isinstance(model.config, AutoregressiveConfig):
            weights, mixing = self._weights(SIBLING_WEIGHTS), self.curriculum.mixing(default=0.5)
            smoothing = self.label_smoothing
            return autoregressive_loss(
                model, *batch, weights=weights, mixing=mixing, label_smoothing=smoothing
            )
        weights, mixing = self._weights(LossWeights()), self.curriculum.mixing(default=0.8)
        return nast_loss(model, *batch, weights=weights, mixing=mixing)

    def _weights(self, default: LossWeights) -> LossWeights:
        names = ("source", "target", "inner_source", "inner_target")
        given = {name: getattr(self, name) for name in names}
        return replace(default, **{name: value for name, value in given.items() if value is not None})
