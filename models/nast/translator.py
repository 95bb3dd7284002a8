"""A trained model behind one call: features in, translations out; the same object offline and online.

Utterances are batched by padded frames, and a result does not depend on its batch mates (the models mask padding
everywhere), so an offline text is the online text. Audio of less than one frame gives an empty text.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from eagleray.models.nast.autoregressive import AutoregressiveModel, beam_search
from eagleray.models.nast.decoding import greedy, greedy_hypotheses, prefix_beam_search
from eagleray.models.nast.frontend import Frontend
from eagleray.models.nast.model import NastModel, SpeechModel
from eagleray.models.nast.vocabulary import Vocabulary, load_vocabularies

_CLASSES: dict[str, type[SpeechModel]] = {"nast": NastModel, "nast-autoregressive": AutoregressiveModel}
_MAX_TOKENS = 200
"""Longest text of the sibling. One number for all: a bound by the longest of a batch would make texts depend on it."""


class Decoded(NamedTuple):
    """What a model says about one utterance, in pieces."""

    target: list[int]
    source: list[int]
    """The transcript of the source head; empty for the sibling, whose search does not need that head."""
    score: float


@dataclass(frozen=True)
class Translation:
    """What a model says about one utterance."""

    text: str
    """The translation."""
    transcript: str
    """What the source head heard; empty for the sibling."""
    score: float
    """Log-probability: of the best path (greedy), or of the text (beam)."""
    frames: int = 0
    """Frames of the features."""
    compute_s: float = 0.0
    """Share of its batch's computing time, by frames; without features."""


@torch.inference_mode()
def decode(model: SpeechModel, features_BTF: Tensor, lengths_B: Tensor, *, beam: int = 1) -> list[Decoded]:
    """Translate a padded batch with a model in evaluation mode.

    Args:
        model: `NastModel`, decoded by CTC, or `AutoregressiveModel`.
        features_BTF: Features, padded on the right.
        lengths_B: Frames of each utterance.
        beam: Beam width; 1 is greedy.
    """
    features_BTF = features_BTF.to(model.dtype)
    if isinstance(model, AutoregressiveModel):
        found = beam_search(model, features_BTF, lengths_B, width=beam, max_length=_MAX_TOKENS)
        return [Decoded(best[0].tokens, [], best[0].log_prob) for best in found]
    output = model(features_BTF, lengths_B)
    blank = model.config.blank_token_id
    sources = greedy(output.source.logits_BSV, output.source.lengths_B, blank_id=blank)
    top = (output.target.logits_BSV, output.target.lengths_B)
    if beam == 1:
        targets = greedy_hypotheses(*top, blank_id=blank)
    else:
        targets = [best[0] for best in prefix_beam_search(*top, width=beam, blank_id=blank)]
    return [Decoded(t.tokens, s, t.log_prob) for t, s in zip(targets, sources, strict=True)]


def model_class(folder: Path) -> type[SpeechModel]:
    """Class of the model in a model folder of `nast.train`.

    Raises:
        ValueError: The folder is not such a folder.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"{folder} holds no config.json; give the `model` folder of a run of `nast.train`.")
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    if kind not in _CLASSES:
        raise ValueError(f"{config}: the model is a {kind!r}; it must be one of {', '.join(_CLASSES)}.")
    return _CLASSES[kind]


class Translator:
    """A model with its front end and vocabularies.

    Args:
        model: Any of the two models; put into evaluation mode.
        frontend: From waveforms to features.
        target: Vocabulary of the translation.
        source: Vocabulary of the transcript.
        beam: Beam width; 1 is greedy.
        max_batch_frames: Most padded frames of one batch; a longer utterance is alone.
    """

    def __init__(
        self,
        model: SpeechModel,
        frontend: Frontend,
        target: Vocabulary,
        source: Vocabulary,
        *,
        beam: int = 1,
        max_batch_frames: int = 40_000,
    ) -> None:
        self.model, self.frontend = model.eval(), frontend
        self.target, self.source = target, source
        self.beam, self.max_batch_frames = beam, max_batch_frames

    @classmethod
    def from_pretrained(
        cls, folder: Path, *, device: str = "auto", beam: int = 1, max_batch_frames: int = 40_000
    ) -> Translator:
        """Load a model folder of `nast.train`.

        Raises:
            ValueError: The folder is not such a folder.
        """
        found = model_class(folder)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = cast(Any, found.from_pretrained(folder, use_safetensors=True)).to(device)
        target, source = load_vocabularies(folder)
        frontend = Frontend.load(folder)
        return cls(model, frontend, target, source, beam=beam, max_batch_frames=max_batch_frames)

    def features(self, waveform_N: np.ndarray) -> Tensor:
        """Features [T, 80] of a 16 kHz waveform."""
        return self.frontend(waveform_N)

    def translate(self, features: Sequence[Tensor]) -> list[Translation]:
        """Translations of utterances given by their features, in order."""
        results = [Translation("", "", 0.0)] * len(features)
        for batch in self._batches([len(feature) for feature in features]):
            started = time.perf_counter()
            found = self._decode([features[i] for i in batch])
            seconds = time.perf_counter() - started
            frames = sum(len(features[i]) for i in batch)
            for i, decoded in zip(batch, found, strict=True):
                results[i] = Translation(
                    text=self.target.decode(decoded.target),
                    transcript=self.source.decode(decoded.source),
                    score=decoded.score,
                    frames=len(features[i]),
                    compute_s=seconds * len(features[i]) / frames,
                )
        return results

    def _decode(self, features: Sequence[Tensor]) -> list[Decoded]:
        device = self.model.device
        padded = pad_sequence(list(features), batch_first=True).to(device)
        lengths = torch.tensor([len(feature) for feature in features], device=device)
        return decode(
            self.model, padded, lengths, beam=self.beam
        )  # lists of numbers: the device has finished

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of utterances that have frames, the longest first, as many as the budget allows."""
        order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
        while order:
            count = max(1, self.max_batch_frames // lengths[order[0]])
            yield order[:count]
            order = order[count:]
