"""Cutting long recordings where it is quiet, so that each piece fits the model and no word is cut.

Greedy from the left: a piece ends at the quietest place in its second half, later ones first among equals. The
pieces cover the recording without gaps, so the texts of the pieces, joined, are the text of the recording.
"""

from __future__ import annotations

import numpy as np

_STEP_S, _WINDOW_S = 0.01, 0.1


def split_at_silence(
    waveform_N: np.ndarray, *, sample_rate: int, max_seconds: float
) -> list[tuple[int, int]]:
    """Start and end (in samples) of pieces of at most `max_seconds`, in order; a short recording is one piece.

    Raises:
        ValueError: `max_seconds` is shorter than the window in which loudness is measured.
    """
    if max_seconds < 4 * _WINDOW_S:
        raise ValueError(f"`max_seconds` is {max_seconds:g}; it must be at least {4 * _WINDOW_S:g}.")
    longest, step = int(max_seconds * sample_rate), int(_STEP_S * sample_rate)
    if len(waveform_N) <= longest:
        return [(0, len(waveform_N))]
    loudness = _loudness(waveform_N, sample_rate, step)
    pieces, start = [], 0
    while len(waveform_N) - start > longest:
        # Steps at which the piece may end; the last piece must not be left with a sliver.
        rest = len(waveform_N) - start
        earliest = start + max(longest // 2, 1)
        latest = start + (longest if rest >= 1.5 * longest else min(longest, rest - longest // 4))
        first, last = -(-earliest // step), latest // step
        window = loudness[first : last + 1]
        end = (last - int(window[::-1].argmin())) * step
        pieces.append((start, end))
        start = end
    return [*pieces, (start, len(waveform_N))]


def _loudness(waveform_N: np.ndarray, sample_rate: int, step: int) -> np.ndarray:
    """Mean square around each step of 10 ms."""
    half = int(_WINDOW_S * sample_rate) // 2
    sums = np.concatenate([[0.0], np.cumsum(waveform_N.astype(np.float64) ** 2)])
    centres = np.arange(0, len(waveform_N) + 1, step)
    low, high = np.maximum(centres - half, 0), np.minimum(centres + half, len(waveform_N))
    return (sums[high] - sums[low]) / np.maximum(high - low, 1)
