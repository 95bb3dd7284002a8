"""Plots of an evaluation are written as pictures, from the figures of the report, without global pyplot state."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from eagleray.models.gram.judge import read_out
from eagleray.models.gram.metrics import evaluate_comparisons
from eagleray.models.gram.plots import plot_accuracy, plot_length_gap, plot_reliability


@pytest.mark.parametrize("plot", [plot_accuracy, plot_reliability, plot_length_gap])
def test_plot_of_two_scorers(plot, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    had_pyplot = "matplotlib.pyplot" in sys.modules
    figures = {
        name: evaluate_comparisons(
            [read_out(*row) for row in rng.normal(mean, 1.0, size=(40, 2)).tolist()],
            prompts=[f"q{i}" for i in range(40)],
            length_gaps=list(range(-400, 400, 20)),
            samples=20,
        )
        for name, mean in (("judge", 1.0), ("other", 0.0))
    }
    plot(figures, tmp_path / "plot.png", title="a set")
    pixels = matplotlib.image.imread(tmp_path / "plot.png")
    assert min(pixels.shape[:2]) > 200
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 10  # not an empty canvas
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot
