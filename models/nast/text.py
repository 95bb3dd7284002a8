"""The textual encoder alone as a translator of text: CTC over upsampled source pieces (Libovický and Helcl 2018).

It shows on sentences without audio what the encoder can re-order. Source pieces are embedded with sinusoidal positions,
which frames of speech do not need, and each state is split into `upsampling` of them, so that CTC has room for a
translation that is longer than its source. The textual encoder, its inner CTC, cross-layer attention and curriculum
mixing are those of the speech model, with the same code.

Shapes: B sentences, U source pieces, S = upsampling · U positions, D width, V tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from eagleray.models.nast.attention import sinusoids
from eagleray.models.nast.config import NastConfig
from eagleray.models.nast.curriculum import Mixing
from eagleray.models.nast.encoder import DrawOracle, Prediction, TextualEncoder
from eagleray.models.nast.losses import LossWeights, mean_ctc, oracle_of, weighted_sum
from eagleray.models.nast.model import SpeechModel
from eagleray.models.nast.prediction import AdapterKind, CtcHead


@strict
class TextConfig(NastConfig):
    """Sizes of the textual encoder; there is no acoustic one, and the vocabulary is joint."""

    model_type = "nast-text"

    upsampling: int = 3
    """Positions for each source piece."""
    acoustic_layers: int = 1
    inner_source_layers: list[int] = field(default_factory=list)
    adapter: AdapterKind = "none"

    def __post_init__(self, **kwargs: object) -> None:
        if self.upsampling < 1:
            raise ValueError(f"`upsampling` is {self.upsampling}; it must be at least 1.")
        super().__post_init__(**kwargs)


@dataclass
class TextOutput:
    """What the textual encoder gives."""

    target: Prediction
    inner_target: dict[int, Prediction]
    """By layer."""


class TextModel(SpeechModel):
    """Source pieces to target CTC logits in one pass."""

    config_class = TextConfig
    main_input_name = "source_BU"

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.upsampler = nn.Linear(config.width, config.upsampling * config.width)
        self.textual = TextualEncoder(config)
        self.target_head = CtcHead(
            width=config.width,
            vocab_size=config.vocab_size,
            pad_id=config.pad_token_id,
            dropout=config.dropout,
        )
        self._tied_weights_keys = {"embedding.weight": "target_head.weight"}
        self.post_init()

    def forward(
        self, source_BU: Tensor, lengths_B: Tensor, *, draw_oracle: DrawOracle | None = None
    ) -> TextOutput:
        """Logits of all heads.

        Args:
            source_BU: Source pieces, padded on the right with anything in the vocabulary.
            lengths_B: Pieces of each sentence, int, at least 1.
            draw_oracle: What inner predictions are told in training (`curriculum.py`).
        """
        width, times = self.config.width, self.config.upsampling
        x_BUD = self.embedding(source_BU) * math.sqrt(width)
        positions = torch.arange(source_BU.shape[1], device=x_BUD.device, dtype=torch.float32)
        x_BUD = F.dropout(x_BUD + sinusoids(positions, width).to(x_BUD), self.config.dropout, self.training)
        x_BSD = self.upsampler(x_BUD).view(len(source_BU), -1, width)
        _, target, inner = self.textual(x_BSD, times * lengths_B, self.target_head, draw_oracle)
        return TextOutput(target, inner)


def text_loss(
    model: TextModel,
    source_BU: Tensor,
    source_lengths_B: Tensor,
    target_BU: Tensor,
    target_lengths_B: Tensor,
    *,
    weights: LossWeights | None = None,
    mixing: Mixing | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed CTC of the translation at the top and inside, and its unweighted terms; arguments as in `nast_loss`."""
    draw = oracle_of(model, target_BU, target_lengths_B, mixing or Mixing(), generator)
    output = model(source_BU, source_lengths_B, draw_oracle=draw)
    labels = (target_BU, target_lengths_B)
    terms = {"target": mean_ctc([output.target], *labels, blank_id=model.config.blank_token_id)}
    if output.inner_target:
        inner = output.inner_target.values()
        terms["inner_target"] = mean_ctc(inner, *labels, blank_id=model.config.blank_token_id)
    return weighted_sum(terms, weights or LossWeights()), {k: term.detach() for k, term in terms.items()}
