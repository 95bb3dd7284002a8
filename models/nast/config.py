"""Sizes and switches of the two models, in the Hugging Face format.

The defaults are the paper's (`reproduction_nast.yaml` of the released code, spec 4.1). Each step of the ablation ladder
is a switch: plain two-CTC baseline = no inner layers, both adapters `none`, `cross_layer_source` none,
`acoustic_block` transformer.
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from eagleray.models.nast.prediction import AdapterKind


@strict
class NastConfig(PreTrainedConfig):
    """The non-autoregressive model."""

    model_type = "nast"

    vocab_size: int = 10_000
    """Tokens of the translation; of both languages unless `source_vocab_size` is given."""
    source_vocab_size: int | None = None
    """Tokens of a separate source vocabulary; the source head then has a weight of its own."""
    feature_size: int = 80
    """Mel bins."""
    width: int = 512
    heads: int = 8
    inner_width: int = 2048
    """Width inside feed-forward networks."""
    subsampler_width: int = 2048
    """Channels of the first convolution, of `conv1d` before GLU."""
    dropout: float = 0.15
    subsampling: Literal["convolution", "progressive"] = "convolution"
    """`convolution`: all strides before the first layer. `progressive`: one before each stage of layers (PDS)."""
    subsampler: Literal["conv1d", "conv2d"] = "conv1d"
    """Convolutions on the features: over time (paper), or over time and frequency."""
    strides: list[int] | None = None
    """Default: [2, 2] for `convolution`, [2, 2, 1, 2] for `progressive`."""
    compat_unmasked_subsampler: bool = False
    """As the reference, let padding reach the last frame."""
    acoustic_layers: int = 12
    acoustic_block: Literal["conformer", "transformer"] = "conformer"
    conv_kernel: int = 15
    conv_activation: Literal["relu", "swish"] = "relu"
    conv_norm: Literal["batch_norm", "layer_norm"] = "batch_norm"
    """`layer_norm` makes a loss independent of the other clips of its batch."""
    textual_layers: int = 12
    inner_source_layers: list[int] = field(default_factory=lambda: [6, 9])
    """Acoustic layers after which source CTC is computed."""
    inner_target_layers: list[int] = field(default_factory=lambda: [6, 9])
    """Textual layers after which target CTC is computed."""
    source_prediction: AdapterKind = "inter_league"
    """What acoustic layers with CTC are told of their prediction."""
    target_prediction: AdapterKind = "inter_league"
    """What textual layers with CTC are told of their prediction."""
    adapter: AdapterKind = "inter_league"
    """What the textual encoder is told of the top source prediction."""
    prediction_from_normalised: bool = True
    """Go on from the normalised state after an inner prediction, not from the residual stream."""
    cross_layer_source: int | None = 3
    """Textual layer whose output all higher ones attend to; none: no cross-layer attention."""
    drop_net: float = 0.1
    """Chance of leaving out self-attention in layers with cross-layer attention."""
    tie_word_embeddings: bool = True
    """One weight for both heads and the sibling's decoder; a separate source vocabulary leaves the source head out."""
    blank_token_id: int = 0
    pad_token_id: int = 1
    eos_token_id: int = 2

    def __post_init__(self, **kwargs: object) -> None:
        if self.strides is None:
            self.strides = [2, 2] if self.subsampling == "convolution" else [2, 2, 1, 2]
        self._check_sizes()
        super().__post_init__(**kwargs)

    @property
    def all_strides(self) -> tuple[int, ...]:
        """Strides between features and the top of the acoustic encoder."""
        return tuple(self.strides or ())

    def _check_sizes(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"`width` is {self.width}; it must be a multiple of 2 x `heads` = {2 * self.heads}."
            )
        for name, layers, count in (
            ("inner_source_layers", self.inner_source_layers, self.acoustic_layers),
            ("inner_target_layers", self.inner_target_layers, self.textual_layers),
        ):
            if any(not 1 <= layer < count for layer in layers):
                raise ValueError(
                    f"`{name}` is {layers}; each must be at least 1 and below the {count} layers of that encoder, "
                    "whose last one has the top head."
                )
        source = self.cross_layer_source
        if source is not None and not 1 <= source < self.textual_layers:
            raise ValueError(
                f"`cross_layer_source` is {source}; it must be at least 1 and below `textual_layers` = "
                f"{self.textual_layers}, or none."
            )
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"`conv_kernel` is {self.conv_kernel}; it must be odd.")
        if self.subsampling == "progressive" and self.acoustic_layers % len(self.strides or [1]):
            raise ValueError(
                f"`acoustic_layers` is {self.acoustic_layers}; it must be a multiple of the "
                f"{len(self.strides or [])} stages in `strides`."
            )


@strict
class AutoregressiveConfig(NastConfig):
    """The autoregressive sibling (recipe `ctc_aug`): 12 acoustic, 6 textual and 6 decoder layers."""

    model_type = "nast-autoregressive"

    textual_layers: int = 6
    inner_target_layers: list[int] = field(default_factory=lambda: [4])
    cross_layer_source: int | None = 2
    prediction_from_normalised: bool = False
    decoder_layers: int = 6
