"""Reading audio: formats, rates, channels, parts, limits, and every kind of broken file."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from eagleray.models.nast.audio import (
    SAMPLE_RATE,
    Clip,
    clip_seconds,
    from_pcm,
    probe,
    read_audio,
    read_clips,
    to_pcm,
    write_wav,
)
from eagleray.models.nast.errors import SpeechDataError


def tone(seconds: float, rate: int = SAMPLE_RATE, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_formats_and_rates_give_the_same_tone(tmp_path: Path, rate: int, suffix: str) -> None:
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, tone(0.5, rate), rate)
    waveform = read_audio(path)
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    assert len(waveform) == pytest.approx(SAMPLE_RATE / 2, abs=2)
    assert probe(path.read_bytes()).sample_rate == rate
    middle = waveform[2000:6000]  # away from the edges, where resampling and coding ring
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(4000)))
    assert spectrum.argmax() * SAMPLE_RATE / 4000 == pytest.approx(440, abs=4)
    assert np.abs(middle).max() == pytest.approx(0.5, abs=0.05)


def test_stereo_is_the_mean_of_its_channels(tmp_path: Path) -> None:
    stereo = np.stack([tone(0.1), 0.5 * tone(0.1, hertz=880)], axis=1)
    soundfile.write(tmp_path / "a.wav", stereo, SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), stereo.mean(axis=1), atol=1e-6)


def test_a_part_is_that_part(tmp_path: Path) -> None:
    whole = tone(1.0)
    soundfile.write(tmp_path / "a.wav", whole, SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_array_equal(
        read_audio(tmp_path / "a.wav", offset=0.25, duration=0.5), whole[4000:12000]
    )
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", offset=0.75), whole[12000:])
    # A table rounds its times: the end of the part may lie a little behind the end of the file.
    assert len(read_audio(tmp_path / "a.wav", offset=0.5, duration=0.55)) == 8000


def test_clips_are_joined_with_their_pauses(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(0.2, 8000), 8000)
    clips = [Clip(str(tmp_path / "a.wav"), pause=0.1), Clip(str(tmp_path / "a.wav"), 0.05, 0.1)]
    joined = read_clips(clips)
    assert len(joined) == 3200 + 1600 + 1600
    assert not joined[3200:4800].any() and joined[4800:].any()
    assert [clip_seconds(clip) for clip in clips] == pytest.approx([0.3, 0.1])


def test_a_two_hour_file_is_refused_by_its_header(tmp_path: Path) -> None:
    """A sparse file: its header is all there is, and nothing else is read."""
    size = 2 * 3600 * SAMPLE_RATE * 2
    path = tmp_path / "long.wav"
    head = b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt "
    head += struct.pack("<IHHIIHH", 16, 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
    with path.open("wb") as file:
        file.write(head + b"data" + struct.pack("<I", size))
        file.truncate(44 + size)
    assert probe(path).seconds == 7200
    with pytest.raises(SpeechDataError, match=r"the audio is too long: 7200.0 s, at most 3600 s"):
        read_audio(path)
    assert len(read_audio(path, offset=7000, duration=0.5)) == 8000  # a part of it is fine


def _broken(folder: Path, kind: str) -> Path:
    path = folder / "broken.wav"
    whole = folder / "whole.wav"
    soundfile.write(whole, tone(0.5), SAMPLE_RATE)
    if kind == "text":
        path.write_text("This is not audio, whatever its name says.")
    elif kind == "video":
        path.write_bytes(b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(range(256)) * 20)
    elif kind == "no byte":
        path.touch()
    elif kind == "no sample":
        soundfile.write(path, tone(0), SAMPLE_RATE)
    elif kind == "truncated wav":
        path.write_bytes(whole.read_bytes()[:6000])
    elif kind == "truncated flac":
        soundfile.write(folder / "whole.flac", np.random.default_rng(0).normal(0, 0.1, 8000), SAMPLE_RATE)
        path.write_bytes((folder / "whole.flac").read_bytes()[:6000])
    elif kind == "header only":
        path.write_bytes(b"RIFF\0\0\0\0WAVE")
    elif kind == "not finite":
        soundfile.write(path, np.full(100, np.nan, np.float32), SAMPLE_RATE, subtype="FLOAT")
    elif kind == "channels":
        soundfile.write(path, np.zeros((100, 33)), SAMPLE_RATE)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "not a readable audio file"),
        ("video", "not a readable audio file"),
        ("no byte", "the audio is empty: the file has no byte"),
        ("no sample", "the audio is empty: it has no sample"),
        ("truncated wav", "the audio is cut off: 5956 of 16000 bytes are there"),
        ("truncated flac", "the audio is (damaged|cut off)"),
        ("header only", "not a readable audio file"),
        ("not finite", "values that are not finite"),
        ("channels", "too many channels: 33, at most 32"),
        ("missing", "there is no such audio file"),
    ],
)
def test_broken_files(tmp_path: Path, kind: str, message: str) -> None:
    path = _broken(tmp_path, kind)
    with pytest.raises(SpeechDataError, match=message) as caught:
        read_audio(path)
    assert caught.value.where == str(path)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    if path.exists():
        with pytest.raises(SpeechDataError, match=f"audio: .*{message}"):
            read_audio(path.read_bytes())


@pytest.mark.parametrize("part", [(-0.1, None), (0.5, 0.1), (0.4, 0.5), (0.1, 0.0), (9.0, None)])
def test_parts_outside_the_file(tmp_path: Path, part: tuple[float, float | None]) -> None:
    write_wav(tmp_path / "a.wav", tone(0.5))
    with pytest.raises(SpeechDataError, match=r"the part lies outside the audio: .* of 0\.500 s"):
        read_audio(tmp_path / "a.wav", offset=part[0], duration=part[1])


def test_silent_clipped_and_streamed_audio_is_audio(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "loud.wav", np.full(400, 3.0, np.float32), SAMPLE_RATE, subtype="FLOAT")
    assert read_audio(tmp_path / "loud.wav").max() == 1.0
    write_wav(tmp_path / "silent.wav", np.zeros(400, np.float32))
    assert not read_audio(tmp_path / "silent.wav").any()
    # Programs that write to a pipe do not know the length and leave the largest number.
    data = bytearray((tmp_path / "silent.wav").read_bytes())
    data[40:44] = b"\xff\xff\xff\xff"
    assert len(read_audio(bytes(data))) == 400


def test_16_bit_samples_come_back_as_they_were() -> None:
    steps = np.array([-1.0, -(2.0**-15), 0.0, 0.25, 1.0 - 2.0**-15], np.float32)
    np.testing.assert_array_equal(from_pcm(to_pcm(steps)), steps)
    np.testing.assert_allclose(from_pcm(to_pcm(np.array([2.0, -3.0]))), [1.0 - 2.0**-15, -1.0])
