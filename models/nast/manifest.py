"""The typed row of speech translation data, and checks of it that need only the header of the audio."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from random import Random

from eagleray.models.nast.audio import Clip, clip_seconds
from eagleray.models.nast.errors import SpeechDataError

MIN_SECONDS = 0.065
"""Shortest utterance: five frames of 25 ms, 10 ms apart."""


@dataclass(frozen=True)
class Utterance:
    """One utterance with its transcript and translation."""

    id: str
    clips: tuple[Clip, ...]
    """Where the audio is; one stretch of a file, or several joined."""
    source: str = ""
    """Transcript in the source language; may be empty."""
    target: str = ""
    """Translation; may be empty where only audio is given."""
    speaker: str = ""
    where: str = ""
    """File and line of the row, for messages."""

    @property
    def audio(self) -> str:
        """Path of the first audio file."""
        return self.clips[0].path

    @property
    def offset(self) -> float:
        """Start in the first file, in seconds."""
        return self.clips[0].offset


def check_utterance(
    utterance: Utterance, *, max_seconds: float, min_seconds: float = MIN_SECONDS, need_target: bool = True
) -> float:
    """Length in seconds of an utterance that can be used, from the headers of its files.

    Raises:
        SpeechDataError: Its audio is missing, broken, empty, too short or too long, or its target is empty.
    """
    if need_target and not utterance.target.strip():
        raise SpeechDataError(utterance.where, "the target text is empty")
    try:
        seconds = sum(clip_seconds(clip) for clip in utterance.clips)
    except SpeechDataError as error:
        # The row is named first, because it is where people look; the reason stays countable.
        detail = f"{error.where}: {error.detail}" if error.detail else error.where
        raise SpeechDataError(utterance.where, error.reason, detail) from None
    if seconds < min_seconds:
        raise SpeechDataError(
            utterance.where,
            "the audio is too short",
            f"{seconds:.3f} s, at least {min_seconds:g} s are needed",
        )
    if seconds > max_seconds:
        raise SpeechDataError(
            utterance.where, "the audio is too long", f"{seconds:.1f} s, at most {max_seconds:g} s are taken"
        )
    return seconds


def clips_to_text(clips: Sequence[Clip]) -> str:
    """Clips as one JSON text, for the example files."""
    return json.dumps([asdict(clip) for clip in clips], ensure_ascii=False)


def clips_from_text(text: str) -> tuple[Clip, ...]:
    """The reverse of `clips_to_text`."""
    return tuple(Clip(**clip) for clip in json.loads(text))


def unique_ids(utterances: Sequence[Utterance]) -> list[Utterance]:
    """The same utterances with ids that differ: later ones with an id that was there get `#2`, `#3`, ..."""
    seen: dict[str, int] = {}
    result = []
    for utterance in utterances:
        count = seen[utterance.id] = seen.get(utterance.id, 0) + 1
        result.append(utterance if count == 1 else replace(utterance, id=f"{utterance.id}#{count}"))
    return result


def join_utterances(
    utterances: Sequence[Utterance],
    seconds: Sequence[float],
    *,
    count: int,
    pause: float,
    max_seconds: float,
    seed: int,
) -> tuple[list[Utterance], list[float]]:
    """Further utterances, each of two of one speaker in a row, with their lengths in seconds.

    Texts are joined in the order of the audio. Pairs without transcripts of both have none.

    Args:
        utterances: To draw from; where no speaker is named, all count as one.
        seconds: Their lengths.
        count: Pairs to draw; fewer are returned where hardly any fits.
        pause: Seconds of silence between the two.
        max_seconds: Longer pairs are not taken.
        seed: Of the draw.
    """
    rng = Random(f"joined {seed}")
    by_speaker: dict[str, list[int]] = {}
    for i, utterance in enumerate(utterances):
        by_speaker.setdefault(utterance.speaker, []).append(i)
    joined, lengths = [], []
    for _ in range(10 * count):
        if len(joined) == count:
            break
        first = rng.randrange(len(utterances))
        second = rng.choice(by_speaker[utterances[first].speaker])
        length = seconds[first] + pause + seconds[second]
        if length > max_seconds:
            continue
        a, b = utterances[first], utterances[second]
        last = replace(a.clips[-1], pause=a.clips[-1].pause + pause)
        joined.append(
            replace(
                a,
                id=f"joined-{len(joined)}",
                clips=(*a.clips[:-1], last, *b.clips),
                source=f"{a.source} {b.source}" if a.source and b.source else "",
                target=f"{a.target} {b.target}",
            )
        )
        lengths.append(length)
    return joined, lengths
