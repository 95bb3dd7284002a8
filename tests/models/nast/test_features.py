"""Checks A11 (features) and A18 (SpecAugment)."""

from __future__ import annotations

import math

import pytest
import torch
from torchaudio.compliance import kaldi

from eagleray.models.nast.features import (
    GlobalStatistics,
    SpecAugment,
    add_noise,
    fbank,
    frame_count,
    normalise,
    spec_augment,
    speed,
    to_level,
)


def two_tones(samples: int = 8000) -> torch.Tensor:
    t = torch.arange(samples, dtype=torch.float64) / 16_000
    wave = 0.3 * torch.sin(2 * math.pi * 440 * t) + 0.1 * torch.sin(2 * math.pi * 1870 * t)
    return wave.float()


def test_a11_values() -> None:
    features = fbank(two_tones())
    assert features.shape == (48, 80)
    assert features.mean().item() == pytest.approx(8.0284, abs=1e-3)
    assert features.std().item() == pytest.approx(7.1913, abs=1e-3)
    expected = {0: 7.6102, 10: 15.1994, 20: 12.4305, 40: 24.9649}
    for index, value in expected.items():
        assert features[0, index].item() == pytest.approx(value, abs=1e-3)
    assert features[0, 60].item() == pytest.approx(1.8715, abs=2e-2)
    assert features[0, 79].item() == pytest.approx(-3.5331, abs=2e-2)


@pytest.mark.parametrize(("samples", "frames"), [(400, 1), (559, 1), (560, 2), (16_000, 98)])
def test_a11_frames(samples: int, frames: int) -> None:
    assert frame_count(samples) == frames == len(fbank(two_tones(samples)))


def test_a11_features_are_a_function_of_the_waveform() -> None:
    assert torch.equal(fbank(two_tones()), fbank(two_tones()))


@pytest.mark.parametrize(("warp", "max_frequency"), [(1.0, 8000.0), (0.9, 8000.0), (1.2, 4000.0)])
def test_a11_features_are_kaldis(warp: float, max_frequency: float) -> None:
    wave = two_tones() + 0.01 * torch.randn(8000, generator=torch.Generator().manual_seed(0))
    upper = {"high_freq": max_frequency, "vtln_high": max_frequency - 500, "vtln_warp": warp}
    expected = kaldi.fbank(wave[None] * 2**15, num_mel_bins=80, dither=0.0, **upper)
    found = fbank(wave, max_frequency=max_frequency, warp=warp)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_longer_vocal_tract_moves_a_tone_down() -> None:
    peaks = [fbank(two_tones(), warp=warp)[10].argmax().item() for warp in (0.8, 1.0, 1.25)]
    assert peaks == sorted(peaks) and len(set(peaks)) == 3


def test_noise_has_its_level_and_silence_none() -> None:
    wave, generator = two_tones(16_000), torch.Generator().manual_seed(0)
    noise = add_noise(wave, 20.0, generator=generator) - wave
    assert 10 * math.log10(wave.square().mean() / noise.square().mean()) == pytest.approx(20.0, abs=0.2)
    assert not add_noise(torch.zeros(500), 0.0).any()


def test_level_does_not_depend_on_loudness() -> None:
    quiet = to_level(1e-3 * two_tones(), 0.05)
    assert quiet.square().mean().sqrt().item() == pytest.approx(0.05, rel=1e-4)
    torch.testing.assert_close(quiet, to_level(two_tones(), 0.05))
    assert not to_level(torch.zeros(500), 0.05).any()


@pytest.mark.parametrize(("factor", "samples"), [(1.1, 7273), (0.9, 8889), (1.0, 8000)])
def test_a11_speed(factor: float, samples: int) -> None:
    changed = speed(two_tones(), factor)
    assert changed.shape == (samples,)
    spectrum = torch.fft.rfft(changed).abs()
    assert spectrum.argmax().item() * 16_000 / samples == pytest.approx(440 * factor, abs=2.5)


def test_normalise_over_the_clip_and_over_a_corpus() -> None:
    generator = torch.Generator().manual_seed(0)
    clips = [torch.randn(n, 80, generator=generator) * 3 + 5 for n in (40, 70)]
    own = normalise(clips[0])
    torch.testing.assert_close(own.mean(0), torch.zeros(80), atol=1e-5, rtol=0)
    torch.testing.assert_close(own.var(0, unbiased=False), torch.ones(80), atol=1e-4, rtol=0)
    statistics = GlobalStatistics.of(clips)
    together = torch.cat([normalise(clip, statistics) for clip in clips])
    torch.testing.assert_close(together.mean(0), torch.zeros(80), atol=1e-5, rtol=0)
    torch.testing.assert_close(together.var(0, unbiased=False), torch.ones(80), atol=1e-4, rtol=0)
    assert torch.isfinite(normalise(torch.ones(5, 80))).all()  # silence


def test_a18_bounds_of_time_masks() -> None:
    bounds = [SpecAugment().time_bound(frames) for frames in (10, 19, 20, 1000, 2000, 3000)]
    assert bounds == [0, 0, 1, 50, 100, 100]


def test_a18_masks_have_the_mean_and_their_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1000, 80, generator=generator)
    mean, widths, lengths = features.mean(), set(), set()
    for seed in range(120):
        masked = spec_augment(features, generator=torch.Generator().manual_seed(seed))
        changed = masked != features
        assert (masked[changed] == mean).all()
        columns, rows = changed.all(0), changed.all(1)
        assert torch.equal(changed, columns | rows[:, None])  # whole bands, nothing else
        widths.add(int(columns.sum()))
        lengths.add(int(rows.sum()))
    assert max(widths) <= 52 and max(widths) > 40 and min(widths) < 10
    assert max(lengths) <= 98 and max(lengths) > 75 and min(lengths) < 25
    short = torch.randn(19, 80, generator=generator)
    assert not (spec_augment(short, generator=generator) != short).all(1).any()


def test_a18_the_generator_decides_and_the_input_stays() -> None:
    features = torch.randn(200, 80, generator=torch.Generator().manual_seed(1))
    kept = features.clone()
    first, second = (spec_augment(features, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(features, kept)
    off = SpecAugment(frequency_masks=0, time_masks=0)
    assert torch.equal(spec_augment(features, off), features)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"shape \(399,\); it must be one channel of at least 400 samples"):
        fbank(two_tones(399))
    with pytest.raises(ValueError, match=r"shape \(2, 800\)"):
        fbank(torch.zeros(2, 800))
    with pytest.raises(ValueError, match=r"`factor` is 3.0; it must be in \[0.5, 2\]"):
        speed(two_tones(), 3.0)
    with pytest.raises(ValueError, match="no frames to take statistics of"):
        GlobalStatistics.of([])
