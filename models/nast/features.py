"""Speech features: Kaldi-style log-mel filter banks, normalisation, and changes to training audio (spec 3.3).

Dither is off, so features are a function of the waveform. Everything runs on one clip and on any device.
Windows, filters and resampling kernels are computed once: for short clips they cost more than their use.

Shapes: N samples, T frames, F mel bins.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor
from torchaudio.compliance.kaldi import get_mel_banks

SAMPLE_RATE = 16_000
MEL_BINS = 80
WINDOW, HOP = 400, 160
"""Samples of a window (25 ms) and between windows (10 ms)."""
NYQUIST = SAMPLE_RATE / 2
_FFT = 512


def frame_count(samples: int) -> int:
    """Frames of a waveform, 1 + ⌊(n − 400)/160⌋; 0 if it is shorter than a window.

    >>> frame_count(400), frame_count(560), frame_count(16_000), frame_count(399)
    (1, 2, 98, 0)
    """
    return 0 if samples < WINDOW else 1 + (samples - WINDOW) // HOP


def fbank(waveform_N: Tensor, *, max_frequency: float = NYQUIST, warp: float = 1.0) -> Tensor:
    """Log-mel features [T, 80], float32, of a 16 kHz waveform in [−1, 1].

    Args:
        waveform_N: Samples.
        max_frequency: Upper end of the highest filter in Hz; 4000 for telephone speech, which has nothing above.
        warp: Warping of the frequency axis as for a shorter (below 1) or longer vocal tract (Kaldi's VTLN).

    Raises:
        ValueError: The waveform is not one channel, or shorter than one window.
    """
    if waveform_N.ndim != 1 or len(waveform_N) < WINDOW:
        raise ValueError(
            f"The waveform has shape {tuple(waveform_N.shape)}; it must be one channel of at least {WINDOW} samples "
            "(25 ms). Leave shorter clips out."
        )
    frames = (waveform_N.float() * 2**15).unfold(0, WINDOW, HOP)
    frames = frames - frames.mean(1, keepdim=True)
    before = F.pad(frames[:, :-1], (1, 0), mode="replicate")
    spectrum = torch.fft.rfft((frames - 0.97 * before) * _povey_window().to(frames.device), _FFT)
    power = spectrum.real.square() + spectrum.imag.square()
    mel = power[:, :-1] @ _mel_filters(max_frequency, warp).to(power.device)
    return mel.clamp_min(torch.finfo(torch.float32).eps).log()


def normalise(features_TF: Tensor, statistics: GlobalStatistics | None = None) -> Tensor:
    """Zero mean and unit variance of each bin: over the clip itself, or with the statistics of a corpus."""
    if statistics is None:
        mean_F = features_TF.mean(0)
        variance_F = features_TF.square().mean(0) - mean_F.square()
    else:
        mean_F, variance_F = statistics.mean_F.to(features_TF), statistics.variance_F.to(features_TF)
    return (features_TF - mean_F) * variance_F.clamp_min(1e-10).rsqrt()


@dataclass(frozen=True)
class GlobalStatistics:
    """Mean and variance of each bin over a corpus."""

    mean_F: Tensor
    variance_F: Tensor

    @classmethod
    def of(cls, clips: Iterable[Tensor]) -> GlobalStatistics:
        """Over all frames of clips [T, F], in float64.

        Raises:
            ValueError: There is no frame.
        """
        count, total, squares = 0, torch.zeros(1), torch.zeros(1)
        for features_TF in clips:
            count += len(features_TF)
            total = total + features_TF.double().sum(0)
            squares = squares + features_TF.double().square().sum(0)
        if count == 0:
            raise ValueError("There are no frames to take statistics of; give at least one clip.")
        mean_F = total / count
        return cls(mean_F, squares / count - mean_F.square())


def speed(waveform_N: Tensor, factor: float) -> Tensor:
    """The waveform played `factor` times as fast, which also moves its pitch; factor 1 returns it as it is."""
    if not 0.5 <= factor <= 2.0:
        raise ValueError(f"`factor` is {factor}; it must be in [0.5, 2]. The usual ones are 0.9 and 1.1.")
    if factor == 1.0:
        return waveform_N
    return _speed(factor).to(waveform_N.device)(waveform_N)[0]


def add_noise(waveform_N: Tensor, decibels: float, *, generator: torch.Generator | None = None) -> Tensor:
    """The waveform with white noise that is `decibels` weaker than it; silence stays as it is."""
    noise_N = torch.randn(waveform_N.shape, generator=generator).to(waveform_N)
    return waveform_N + waveform_N.square().mean().sqrt() * 10 ** (-decibels / 20) * noise_N


def to_level(waveform_N: Tensor, level: float) -> Tensor:
    """The waveform scaled to a root mean square of `level`; silence stays as it is."""
    power = waveform_N.square().mean()
    return waveform_N * (level * power.rsqrt() if power > 0 else 1.0)


@dataclass(frozen=True)
class SpecAugment:
    """Sizes of the masks; the defaults are the policy "ld2" of the recipe."""

    frequency_masks: int = 2
    frequency_width: int = 27
    """A mask covers fewer bins than this."""
    time_masks: int = 2
    time_width: int = 100
    """A mask covers fewer frames than this."""
    time_share: float = 0.05
    """A mask covers less than this share of the clip."""

    def time_bound(self, frames: int) -> int:
        """A time mask covers fewer frames than this; none if it is 0.

        >>> SpecAugment().time_bound(1000), SpecAugment().time_bound(3000), SpecAugment().time_bound(19)
        (50, 100, 0)
        """
        return min(self.time_width, int(self.time_share * frames))


def spec_augment(
    features_TF: Tensor, policy: SpecAugment | None = None, *, generator: torch.Generator | None = None
) -> Tensor:
    """A copy with bands of frequency and of time filled with the clip's mean; for training only.

    Args:
        features_TF: Normalised features.
        policy: Number and sizes of the masks.
        generator: Source of the draw (on the CPU); default: torch's own.
    """
    policy = policy or SpecAugment()
    frames, bins = features_TF.shape
    masked = features_TF.clone()
    fill = features_TF.mean()

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    for _ in range(policy.frequency_masks):
        width = draw(min(policy.frequency_width, bins))
        start = draw(bins - width)
        masked[:, start : start + width] = fill
    bound = policy.time_bound(frames)
    for _ in range(policy.time_masks if bound else 0):
        width = draw(bound)
        start = draw(frames - width)
        masked[start : start + width] = fill
    return masked


@lru_cache
def _povey_window() -> Tensor:
    return torch.hann_window(WINDOW, periodic=False).pow(0.85)


@lru_cache(maxsize=64)
def _mel_filters(max_frequency: float, warp: float) -> Tensor:
    """Triangles [FFT / 2, F] from 20 Hz upwards; the axis is bent between 100 Hz and 500 Hz below the upper end."""
    filters_FK, _ = get_mel_banks(
        MEL_BINS, _FFT, SAMPLE_RATE, 20.0, max_frequency, 100.0, max_frequency - 500.0, warp
    )
    return filters_FK.T.contiguous()


@lru_cache(maxsize=64)
def _speed(factor: float) -> torchaudio.transforms.Speed:
    return torchaudio.transforms.Speed(SAMPLE_RATE, factor)
