"""Translations in the formats of OpenAI's `/v1/audio/translations`: json, text, verbose_json, srt and vtt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from eagleray.serve.protocol import Piece, TranslateResponse

Format = Literal["json", "text", "verbose_json", "srt", "vtt"]
FORMATS: tuple[Format, ...] = get_args(Format)


class Segment(BaseModel):
    """A stretch of the recording. Token ids and log probabilities, which Whisper gives here, are left out."""

    id: int
    start: float
    end: float
    text: str
    transcript: str


class AudioTranslation(BaseModel):
    """What `json` and `verbose_json` give; the second with times."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    text: str
    task: Literal["translate"] | None = None
    language: str | None = None
    """Not known to the model: always `unknown`."""
    duration: float | None = None
    """Seconds."""
    segments: list[Segment] | None = None


def as_json(found: TranslateResponse, *, verbose: bool) -> AudioTranslation:
    """The translation with or without its segments."""
    if not verbose:
        return AudioTranslation(text=found.text)
    segments = [
        Segment(id=i, start=piece.start, end=piece.end, text=piece.text, transcript=piece.transcript)
        for i, piece in enumerate(found.pieces)
    ]
    return AudioTranslation(
        text=found.text, task="translate", language="unknown", duration=found.seconds, segments=segments
    )


def srt(pieces: Sequence[Piece]) -> str:
    """SubRip subtitles; stretches without a text are left out.

    >>> print(srt([Piece(start=0, end=61.5, text="Good day.", transcript="")]), end="")
    1
    00:00:00,000 --> 00:01:01,500
    Good day.
    <BLANKLINE>
    """
    spoken = [piece for piece in pieces if piece.text]
    return "".join(
        f"{i}\n{_time(p.start, ',')} --> {_time(p.end, ',')}\n{p.text}\n\n" for i, p in enumerate(spoken, 1)
    )


def vtt(pieces: Sequence[Piece]) -> str:
    """WebVTT subtitles; stretches without a text are left out."""
    cues = "".join(f"{_time(p.start, '.')} --> {_time(p.end, '.')}\n{p.text}\n\n" for p in pieces if p.text)
    return f"WEBVTT\n\n{cues}"


def _time(seconds: float, point: str) -> str:
    milliseconds = round(1000 * seconds)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"
