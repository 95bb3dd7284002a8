"""Audio files to waveforms: soundfile reads, torchaudio's functional resamples; neither ffmpeg nor torchcodec.

Whatever comes in (wav, flac, ogg, mp3; 8 to 192 kHz; any number of channels), a waveform here is float32 in [-1, 1],
one channel (the mean of all), at one rate. Limits are checked against the header before anything is decoded, so a
two-hour file costs no memory; of a long recording only the asked part is read.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torchaudio.functional import resample

from eagleray.models.nast.errors import SpeechDataError

SAMPLE_RATE = 16_000
"""Rate of all waveforms that the models see."""
MAX_SECONDS = 3600.0
"""Longest stretch that is decoded at once unless a caller says otherwise."""
MAX_CHANNELS = 32
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")

# libsndfile silently shortens a wav whose data chunk says more than the file holds; we do not.
_CUT_OFF = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)

Source = str | Path | bytes
"""A file, or the content of one."""


@dataclass(frozen=True)
class Clip:
    """A stretch of an audio file, and the silence after it."""

    path: str
    offset: float = 0.0
    """Start in seconds."""
    duration: float | None = None
    """Seconds; `None` goes to the end of the file."""
    pause: float = 0.0
    """Seconds of digital silence after the stretch, for utterances joined from several recordings."""


@dataclass(frozen=True)
class AudioInfo:
    """What the header of a file says."""

    frames: int
    sample_rate: int
    channels: int

    @property
    def seconds(self) -> float:
        return self.frames / self.sample_rate


def probe(source: Source) -> AudioInfo:
    """Read the header only.

    Raises:
        SpeechDataError: There is no such file, it is no audio, or it is cut off.
    """
    with _opened(source) as file:
        return AudioInfo(file.frames, file.samplerate, file.channels)


def clip_seconds(clip: Clip) -> float:
    """Length of a clip with its pause, from the header.

    Raises:
        SpeechDataError: As `probe`, or the clip lies outside the file.
    """
    info = probe(clip.path)
    _, count = _span(_name(clip.path), info, clip.offset, clip.duration)
    return count / info.sample_rate + clip.pause


def read_audio(
    source: Source,
    *,
    offset: float = 0.0,
    duration: float | None = None,
    sample_rate: int = SAMPLE_RATE,
    max_seconds: float = MAX_SECONDS,
) -> np.ndarray:
    """Waveform of a file or a part of it: float32, shape (samples,), at `sample_rate`.

    Args:
        source: A file, or its content.
        offset: Start in seconds.
        duration: Seconds to read; `None` goes to the end.
        sample_rate: Rate of the result; other rates are resampled.
        max_seconds: Longest stretch that is decoded.

    Raises:
        SpeechDataError: No such file, no audio, cut off, outside the file, no sample, or longer than `max_seconds`.
    """
    name = _name(source)
    with _opened(source) as file:
        info = AudioInfo(file.frames, file.samplerate, file.channels)
        start, count = _span(name, info, offset, duration)
        if count > max_seconds * info.sample_rate:
            detail = f"{count / info.sample_rate:.1f} s, at most {max_seconds:g} s are taken"
            raise SpeechDataError(name, "the audio is too long", detail)
        try:
            file.seek(start)
            samples_NC = file.read(count, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise SpeechDataError(name, "the audio is damaged", error.error_string) from None
    if len(samples_NC) < count:
        raise SpeechDataError(name, "the audio is cut off", f"{len(samples_NC)} of {count} samples are there")
    waveform_N = samples_NC.mean(axis=1)
    if not np.isfinite(waveform_N).all():
        raise SpeechDataError(name, "the audio holds values that are not finite")
    return to_rate(np.clip(waveform_N, -1.0, 1.0), info.sample_rate, sample_rate)


def read_clips(clips: Sequence[Clip], *, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Waveform of clips one after the other with their pauses: float32, shape (samples,)."""
    parts: list[np.ndarray] = []
    for clip in clips:
        parts.append(
            read_audio(clip.path, offset=clip.offset, duration=clip.duration, sample_rate=sample_rate)
        )
        parts.append(np.zeros(round(clip.pause * sample_rate), np.float32))
    return np.concatenate(parts)


def to_rate(waveform_N: np.ndarray, given: int, wanted: int) -> np.ndarray:
    """Resample by windowed sinc interpolation; the same rate returns the same array."""
    if given == wanted:
        return waveform_N
    return resample(torch.from_numpy(waveform_N), given, wanted).numpy()


def to_pcm(waveform_N: np.ndarray) -> bytes:
    """16-bit samples, rounded, as bytes; two a sample."""
    return np.clip(np.round(waveform_N * 2**15), -(2**15), 2**15 - 1).astype("<i2").tobytes()


def from_pcm(audio: bytes) -> np.ndarray:
    """Waveform of what `to_pcm` wrote: float32, shape (samples,)."""
    return np.frombuffer(audio, "<i2").astype(np.float32) / 2**15


def write_wav(path: Path, waveform_N: np.ndarray, *, sample_rate: int = SAMPLE_RATE) -> None:
    """Write 16-bit PCM."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform_N, sample_rate, subtype="PCM_16")


def _name(source: Source) -> str:
    return "audio" if isinstance(source, bytes) else str(source)


def _span(name: str, info: AudioInfo, offset: float, duration: float | None) -> tuple[int, int]:
    """First sample and number of samples of a part, checked against the file."""
    start = int(offset * info.sample_rate)
    count = info.frames - start if duration is None else int(duration * info.sample_rate)
    if info.frames == 0:
        raise SpeechDataError(name, "the audio is empty", "it has no sample")
    # A table rounds its times: a part that ends a tenth of a second too late is meant to end with the file.
    slack = info.sample_rate // 10
    if start < 0 or count <= 0 or start >= info.frames or start + count > info.frames + slack:
        length = "the end" if duration is None else f"{offset + duration:.3f} s"
        raise SpeechDataError(
            name, "the part lies outside the audio", f"{offset:.3f} s to {length} of {info.seconds:.3f} s"
        )
    return start, min(count, info.frames - start)


@contextmanager
def _opened(source: Source) -> Iterator[soundfile.SoundFile]:
    name = _name(source)
    if not isinstance(source, bytes):
        path = Path(source)
        if not path.is_file():
            raise SpeechDataError(name, "there is no such audio file")
        if path.stat().st_size == 0:
            raise SpeechDataError(name, "the audio is empty", "the file has no byte")
    elif not source:
        raise SpeechDataError(name, "the audio is empty", "the file has no byte")
    try:
        file = soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else str(source))
    except soundfile.LibsndfileError as error:
        raise SpeechDataError(name, "not a readable audio file", error.error_string) from None
    with file:
        cut_off = _CUT_OFF.search(file.extra_info)
        # Whoever writes to a pipe does not know the length and writes the largest number.
        if cut_off and int(cut_off[1]) < 2**32 - 2**16:
            detail = f"{cut_off[2]} of {cut_off[1]} bytes are there"
            raise SpeechDataError(name, "the audio is cut off", detail)
        if file.channels > MAX_CHANNELS:
            detail = f"{file.channels}, at most {MAX_CHANNELS} are taken"
            raise SpeechDataError(name, "the audio has too many channels", detail)
        yield file
