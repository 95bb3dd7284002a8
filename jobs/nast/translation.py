"""Translating many utterances with Ray Data: what `translate`, `evaluate` and `distill` share."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from eagleray.models.nast.audio import SAMPLE_RATE, read_clips
from eagleray.models.nast.errors import SpeechDataError
from eagleray.models.nast.manifest import Utterance, clips_from_text, clips_to_text
from eagleray.models.nast.segmentation import split_at_silence
from eagleray.models.nast.translator import Translation, Translator
from eagleray.platform.config import Config as Section
from eagleray.platform.scoring import Row, Score, map_with_model, map_with_models
from eagleray.platform.sections import RaySection

logger = logging.getLogger(__name__)


class TranslatorSection(Section):
    """A trained model and how it decodes."""

    path: str
    """Model folder of a run of `nast.train`."""
    beam: int = Field(default=1, ge=1)
    """Beam width; 1 is greedy. CTC: prefix beam search; the sibling: beam search."""
    max_batch_frames: int = Field(default=40_000, ge=1)
    """Most padded frames of one batch; 1 translates utterances one by one."""
    piece_seconds: float = Field(default=30.0, ge=0.4)
    """Longer audio is cut at silences into pieces of at most this length."""

    @field_validator("path")
    @classmethod
    def _path_is_absolute(cls, path: str) -> str:
        # Ray's workers run in folders of their own.
        return str(Path(path).expanduser().absolute())


def translate_utterances(
    section: TranslatorSection, utterances: Sequence[Utterance], ray: RaySection, *, skip_errors: bool
) -> list[Row]:
    """One row an utterance: `text`, `transcript`, `score`, `frames`, `seconds`, `compute_s`,
    `feature_s` and `error` (or "").

    Args:
        section: The model.
        utterances: What to translate.
        ray: Workers; each holds the model.
        skip_errors: Whether audio that cannot be decoded gives a row with an `error`, or stops the job.

    Raises:
        SpeechDataError: Audio cannot be decoded.
    """
    results = map_with_model(_build, _arguments(section), _rows(utterances), ray)
    report_undecoded(results, skip_errors=skip_errors)
    return results


def translate_sets(
    models: Mapping[str, TranslatorSection], sets: Mapping[str, Sequence[Utterance]], ray: RaySection
) -> dict[str, dict[str, list[Row]]]:
    """Every set by every model, in one pass of the same workers: set -> model -> rows as of `translate_utterances`.

    Audio that cannot be decoded gives a row with an `error`; `report_undecoded` tells what of it stops the job.
    """
    arguments = {name: _arguments(section) for name, section in models.items()}
    rows = [row for utterances in sets.values() for row in _rows(utterances)]
    found = map_with_models(_build, arguments, dict.fromkeys(models, rows), ray)
    results = {model: iter(translated) for model, translated in found.items()}
    return {
        name: {model: list(islice(translated, len(utterances))) for model, translated in results.items()}
        for name, utterances in sets.items()
    }


def report_undecoded(rows: Sequence[Row], *, skip_errors: bool) -> None:
    """Warn of utterances whose audio could not be decoded.

    Raises:
        SpeechDataError: There are some, and they are not to be skipped.
    """
    errors = [str(row["error"]) for row in rows if row["error"]]
    if errors and not skip_errors:
        raise SpeechDataError(
            f"{len(errors)} of {len(rows)} utterances", "the audio cannot be decoded", errors[0]
        )
    if errors:
        logger.warning("%d utterances could not be decoded, e.g. %s", len(errors), errors[0])


def _arguments(section: TranslatorSection) -> dict[str, Any]:
    return {"section": section.model_dump()}


def _rows(utterances: Sequence[Utterance]) -> list[Row]:
    return [{"clips": clips_to_text(row.clips), "where": row.where or row.id} for row in utterances]


def _build(section: dict[str, Any]) -> Score:
    settings = TranslatorSection.model_validate(section)
    translator = Translator.from_pretrained(
        Path(settings.path), beam=settings.beam, max_batch_frames=settings.max_batch_frames
    )
    return lambda rows: _translate_rows(translator, rows, settings.piece_seconds)


def _translate_rows(translator: Translator, rows: Sequence[Row], piece_seconds: float) -> list[Row]:
    waveforms: list[np.ndarray | SpeechDataError] = []
    for row in rows:
        try:
            waveforms.append(read_clips(clips_from_text(row["clips"])))
        except SpeechDataError as error:
            waveforms.append(SpeechDataError(str(row["where"]), error.reason, error.where))
    spans = [[] if isinstance(wave, SpeechDataError) else _spans(wave, piece_seconds) for wave in waveforms]
    pieces, feature_s = [], []
    for wave, cuts in zip(waveforms, spans, strict=True):
        started = time.perf_counter()
        pieces += [translator.features(wave[a:b]) for a, b in cuts if not isinstance(wave, SpeechDataError)]
        feature_s.append(time.perf_counter() - started)
    found = iter(translator.translate(pieces))
    results = []
    for wave, cuts, took_s in zip(waveforms, spans, feature_s, strict=True):
        parts = [next(found) for _ in cuts]
        error = str(wave) if isinstance(wave, SpeechDataError) else ""
        seconds = 0.0 if isinstance(wave, SpeechDataError) else len(wave) / SAMPLE_RATE
        results.append({**asdict(_joined(parts)), "seconds": seconds, "feature_s": took_s, "error": error})
    return results


def _spans(waveform_N: np.ndarray, piece_seconds: float) -> list[tuple[int, int]]:
    return split_at_silence(waveform_N, sample_rate=SAMPLE_RATE, max_seconds=piece_seconds)


def _joined(parts: Sequence[Translation]) -> Translation:
    """The translation of a recording from those of its pieces."""
    return Translation(
        text=" ".join(part.text for part in parts if part.text),
        transcript=" ".join(part.transcript for part in parts if part.transcript),
        score=sum(part.score for part in parts),
        frames=sum(part.frames for part in parts),
        compute_s=sum(part.compute_s for part in parts),
    )
