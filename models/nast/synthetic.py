"""Generated speech-like audio of numbers with their German words, for trying everything without outside data.

A number is spoken digit by digit ("four seven") and written in German, ones before tens ("sieben und vierzig"): the
order of the target is not that of the audio, as in real translation. A digit is two formants over a voiced source
that glide from one place to another, with a burst of noise before some; a voice has its pitch, tempo, formant scale
and noise. Everything is a pure function of its arguments.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from eagleray.models.nast.audio import SAMPLE_RATE, write_wav

Split = Literal["train", "dev", "test"]

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_ONES = ("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun")
_TEENS = {0: "zehn", 1: "elf", 2: "zwölf", 6: "sech zehn", 7: "sieb zehn"}
_TENS = ("", "", "zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig")

# First and second formant at the start and the end of each digit in Hz, and whether a burst of noise comes first.
_FORMANTS = (
    (300, 2300, 500, 900, True),
    (350, 700, 650, 1300, False),
    (320, 1800, 300, 700, True),
    (550, 1400, 280, 2500, True),
    (450, 800, 600, 1000, True),
    (750, 1200, 350, 2200, True),
    (400, 2000, 420, 1600, True),
    (600, 1700, 500, 1300, False),
    (500, 2100, 300, 2500, False),
    (650, 1100, 320, 2000, False),
)


@dataclass(frozen=True)
class Voice:
    """How somebody sounds."""

    pitch: float
    """Fundamental frequency in Hz."""
    tempo: float
    """Speed; 2 halves all durations."""
    formants: float
    """Scale of the formants."""
    noise: float
    """Standard deviation of the background noise; full scale is 1."""


def english_digits(number: int) -> str:
    """The number read digit by digit.

    >>> english_digits(47)
    'four seven'
    """
    return " ".join(DIGITS[int(digit)] for digit in str(number))


def german_number(number: int) -> str:
    """German words of a number from 1 to 999, split where compounds are joined.

    >>> german_number(47), german_number(16), german_number(301)
    ('sieben und vierzig', 'sech zehn', 'drei hundert eins')
    """
    if not 1 <= number <= 999:
        raise ValueError(f"`number` is {number}; it must be 1 to 999.")
    hundreds, rest = divmod(number, 100)
    words = [_stem(hundreds), "hundert"] if hundreds else []
    tens, ones = divmod(rest, 10)
    if tens == 1:
        words.append(_TEENS.get(ones) or f"{_ONES[ones]} zehn")
    elif tens and ones:
        words += [_stem(ones), "und", _TENS[tens]]
    elif rest:
        words.append(_TENS[tens] if tens else _ONES[ones])
    return " ".join(words)


def random_voice(generator: np.random.Generator) -> Voice:
    """A voice drawn at random."""
    return Voice(
        pitch=float(generator.uniform(90, 240)),
        tempo=float(generator.uniform(0.85, 1.25)),
        formants=float(generator.uniform(0.93, 1.08)),
        noise=float(generator.uniform(0.0005, 0.004)),
    )


def speak(number: int, voice: Voice, generator: np.random.Generator) -> np.ndarray:
    """Waveform of a number read digit by digit: float32, shape (samples,), 16 kHz."""
    gap = np.zeros(int(0.05 * SAMPLE_RATE / voice.tempo))
    parts = [gap]
    for digit in str(number):
        parts += [_digit(int(digit), voice, generator), gap]
    clean_N = np.concatenate(parts)
    noisy_N = clean_N + voice.noise * generator.standard_normal(clean_N.size)
    return np.clip(noisy_N, -1, 1).astype(np.float32)


def write_corpus(folder: Path, *, utterances: int, seed: int, split: Split) -> Path:
    """Write `utterances` recordings of numbers from 10 to 99 and their table, which `layouts.read_table` reads.

    Returns:
        The table, `<folder>/<split>.tsv`.
    """
    generator = np.random.default_rng([seed, ("train", "dev", "test").index(split)])
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / f"{split}.tsv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(("id", "audio", "src_text", "tgt_text", "speaker"))
        for index in range(utterances):
            number, voice = int(generator.integers(10, 100)), random_voice(generator)
            name = f"{split}-{index}"
            write_wav(folder / "wav" / f"{name}.wav", speak(number, voice, generator))
            row = (name, f"wav/{name}.wav", english_digits(number), german_number(number))
            writer.writerow((*row, f"voice-{voice.pitch:.0f}"))
    return table


def _stem(ones: int) -> str:
    return "ein" if ones == 1 else _ONES[ones]


def _digit(digit: int, voice: Voice, generator: np.random.Generator) -> np.ndarray:
    first_from, second_from, first_to, second_to, burst = _FORMANTS[digit]
    length = int(0.16 * SAMPLE_RATE / voice.tempo * generator.uniform(0.9, 1.1))
    place_N = np.linspace(0, 1, length)
    time_N = np.arange(length) / SAMPLE_RATE
    source_N = 0.6 + 0.4 * np.sin(2 * np.pi * voice.pitch * time_N)
    signal_N = np.zeros(length)
    for start, end, loudness in ((first_from, first_to, 0.3), (second_from, second_to, 0.2)):
        frequency_N = voice.formants * (start + (end - start) * place_N)
        signal_N += loudness * np.sin(2 * np.pi * np.cumsum(frequency_N) / SAMPLE_RATE)
    voiced_N = source_N * signal_N * np.sin(np.pi * place_N) ** 0.5
    if not burst:
        return voiced_N
    noise_N = 0.08 * generator.standard_normal(int(0.03 * SAMPLE_RATE / voice.tempo))
    return np.concatenate([noise_N, voiced_N])
