"""Speech features: Kaldi-style log-mel filter banks, normalisation, speed perturbation, SpecAugment (spec 3.3).

Dither is off, so features are a function of the waveform. Everything runs on one clip and on any device.

Shapes: N samples, T frames, F mel bins.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torchaudio
from torch import Tensor

SAMPLE_RATE = 16_000
MEL_BINS = 80
WINDOW, HOP = 400, 160
"""Samples of a window (25 ms) and between windows (10 ms)."""


def frame_count(samples: int) -> int:
    """Frames of a waveform, 1 + ⌊(n − 400)/160⌋; 0 if it is shorter than a window.

    >>> frame_count(400), frame_count(560), frame_count(16_000), frame_count(399)
    (1, 2, 98, 0)
    """
    return 0 if samples < WINDOW else 1 + (samples - WINDOW) // HOP


def fbank(waveform_N: Tensor) -> Tensor:
    """Log-mel features [T, 80], float32, of a 16 kHz waveform in [−1, 1].

    Raises:
        ValueError: The waveform is not one channel, or shorter than one window.
    """
    if waveform_N.ndim != 1 or len(waveform_N) < WINDOW:
        raise ValueError(
            f"The waveform has shape {tuple(waveform_N.shape)}; it must be one channel of at least {WINDOW} samples "
            "(25 ms). Leave shorter clips out."
        )
    return torchaudio.compliance.kaldi.fbank(
        waveform_N.float()[None] * 2**15, num_mel_bins=MEL_BINS, sample_frequency=SAMPLE_RATE, dither=0.0
    )


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
    return torchaudio.functional.speed(waveform_N, SAMPLE_RATE, factor)[0]


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
