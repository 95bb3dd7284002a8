"""Synthesised speech: words by hand, the same bytes every time, digits that can be told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eagleray.models.nast.layouts import read_layout
from eagleray.models.nast.manifest import Utterance
from eagleray.models.nast.synthetic import english_digits, german_number, random_voice, speak, write_corpus


@pytest.mark.parametrize(
    ("number", "german"),
    [
        *[(1, "eins"), (10, "zehn"), (11, "elf"), (13, "drei zehn"), (16, "sech zehn"), (20, "zwanzig")],
        *[(21, "ein und zwanzig"), (100, "ein hundert"), (101, "ein hundert eins")],
        *[(217, "zwei hundert sieb zehn"), (473, "vier hundert drei und siebzig")],
    ],
)
def test_german_words(number: int, german: str) -> None:
    assert german_number(number) == german


def test_numbers_out_of_range() -> None:
    assert english_digits(305) == "three zero five"
    with pytest.raises(ValueError, match="`number` is 1000; it must be 1 to 999"):
        german_number(1000)


def test_corpus_is_a_function_of_its_arguments(tmp_path: Path) -> None:
    tables = [write_corpus(tmp_path / name, utterances=6, seed=1, split="train") for name in "ab"]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    for wav in (tmp_path / "a" / "wav").iterdir():
        assert wav.read_bytes() == (tmp_path / "b" / "wav" / wav.name).read_bytes()
    rows = [row for row in read_layout(tables[0]) if isinstance(row, Utterance)]
    assert len(rows) == 6 and len({row.speaker for row in rows}) > 3
    assert (
        write_corpus(tmp_path / "c", utterances=6, seed=1, split="dev").read_bytes() != tables[0].read_bytes()
    )
    for row in rows:
        assert row.target == german_number(int("".join(str(_VALUE[word]) for word in row.source.split())))


_VALUE = {english_digits(digit): digit for digit in range(10)}


def test_digits_differ_more_than_two_voices_do() -> None:
    """Mean log spectra of the same digit in two voices are nearer to each other than to most other digits."""
    generator = np.random.default_rng(0)
    first, second = (
        [_spectrum(speak(d * 11, voice, generator)) for d in range(1, 10)]
        for voice in (random_voice(generator), random_voice(generator))
    )
    right = sum(int(np.argmin([np.abs(a - b).mean() for b in second]) == i) for i, a in enumerate(first))
    assert right >= 5  # of nine; one is chance


def _spectrum(waveform: np.ndarray) -> np.ndarray:
    frames = np.lib.stride_tricks.sliding_window_view(waveform, 400)[::160]
    return np.log(np.abs(np.fft.rfft(frames * np.hanning(400))) + 0.1).mean(axis=0)[:120]
