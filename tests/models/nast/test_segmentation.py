"""Long recordings are cut at the pauses, completely and within the limit."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from eagleray.models.nast.segmentation import split_at_silence

RATE = 16_000


def _speech(*seconds: float, pause: float = 0.4) -> np.ndarray:
    generator = np.random.default_rng(0)
    parts = [
        np.concatenate([generator.normal(0, 0.1, int(s * RATE)), np.zeros(int(pause * RATE))])
        for s in seconds
    ]
    return np.concatenate(parts).astype(np.float32)


def test_cuts_lie_in_the_pauses() -> None:
    waveform = _speech(3, 3, 3, 3)
    pieces = split_at_silence(waveform, sample_rate=RATE, max_seconds=5)
    assert pieces[0][0] == 0 and pieces[-1][1] == len(waveform)
    for (_, end), (start, _) in pairwise(pieces):
        assert end == start
        assert not waveform[end - 500 : end + 500].any()
    assert len(pieces) == 4  # after each of the four stretches of three seconds


@pytest.mark.parametrize("seconds", [0.0, 0.3, 5.0, 5.1, 7.4, 9.9, 31.7])
@pytest.mark.parametrize("level", [0.0, 0.2])
def test_pieces_cover_the_recording_within_the_limit(seconds: float, level: float) -> None:
    """Silence everywhere, or nowhere."""
    waveform = np.random.default_rng(1).normal(0, level, int(seconds * RATE)).astype(np.float32)
    pieces = split_at_silence(waveform, sample_rate=RATE, max_seconds=5)
    assert pieces[0][0] == 0 and pieces[-1][1] == len(waveform)
    assert all(a[1] == b[0] for a, b in pairwise(pieces))
    lengths = [(end - start) / RATE for start, end in pieces]
    assert max(lengths) <= 5 and (len(pieces) == 1 or min(lengths) > 0.5)


def test_a_limit_that_is_too_short() -> None:
    with pytest.raises(ValueError, match=r"`max_seconds` is 0\.1; it must be at least 0\.4"):
        split_at_silence(np.zeros(10), sample_rate=RATE, max_seconds=0.1)
