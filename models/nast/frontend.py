"""From a waveform to the features a model sees; saved with the model, so that training and serving agree."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eagleray.models.nast.features import MEL_BINS, NYQUIST, fbank, frame_count, normalise, to_level

_FILE = "frontend.json"


@dataclass(frozen=True)
class Frontend:
    """Level, dither, log-mel filterbank, normalisation of the utterance; a pure function of the waveform."""

    level: float | None = None
    """Root mean square that every waveform is scaled to before dither; none: as it is recorded."""

    dither: float = 0.0
    """Standard deviation of the noise added to the waveform (full scale is 1). It is the same noise for every
    utterance: digital silence gets a floor, and a result never depends on chance or on batch mates."""
    max_frequency: float = NYQUIST
    """Upper end of the filters in Hz."""

    def __call__(self, waveform_N: np.ndarray, *, warp: float = 1.0) -> Tensor:
        """Features, float32, shape (frames, 80); of less than 25 ms no frame. `warp` is for training only."""
        wave_N = torch.from_numpy(np.ascontiguousarray(waveform_N, dtype=np.float32))
        if self.level is not None and len(wave_N):
            wave_N = to_level(wave_N, self.level)
        if self.dither:
            generator = torch.Generator().manual_seed(0)
            wave_N = wave_N + self.dither * torch.randn(len(wave_N), generator=generator)
        if not frame_count(len(wave_N)):
            return torch.zeros(0, MEL_BINS)
        return normalise(fbank(wave_N, max_frequency=self.max_frequency, warp=warp))

    def settings(self) -> dict[str, Any]:
        """The settings as plain values."""
        return asdict(self)

    def save(self, folder: Path) -> None:
        """Write the settings beside a model."""
        (folder / _FILE).write_text(json.dumps(self.settings(), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Frontend:
        """Settings of a model folder.

        Raises:
            ValueError: The folder has none.
        """
        file = folder / _FILE
        if not file.is_file():
            raise ValueError(f"{folder} holds no {_FILE}; it is no model of `nast.train`.")
        return cls(**json.loads(file.read_text(encoding="utf-8")))
