"""Plots: how alike layers are, what sharing each of them would cost, and how fast models decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from eagleray.models.lisa.similarity import Reduction, Similarity

_READINGS: dict[Reduction, str] = {
    "same_head": "same heads",
    "head_average": "head-averaged weights",
    "best_match": "best source of each head",
    "one_to_one": "best one-to-one assignment",
}


def plot_similarity(similarity: Similarity, path: Path, *, how: Reduction = "one_to_one") -> None:
    """Heat map of the divergence between layers; dark is alike."""
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(similarity.reduce(how), origin="lower", cmap="viridis", vmin=0.0)
    figure.colorbar(image, label="Jensen-Shannon divergence (nats)")
    axes.set(xlabel="target layer", ylabel="source layer", title=_READINGS[how])
    figure.savefig(path, dpi=150)


def plot_neighbours(similarity: Similarity, path: Path) -> None:
    """Divergence of each layer from the one below, read in four ways."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    layers = np.arange(1, len(similarity.averaged))
    for how, label in _READINGS.items():
        axes.plot(layers, similarity.reduce(how)[layers - 1, layers], marker="o", label=label)
    axes.set(xlabel="layer", ylabel="divergence from the layer below (nats)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def plot_sensitivity(probes: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Rise of the loss when one layer shares, for each probe."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, rise in probes.items():
        layers = sorted(rise)
        axes.plot(layers, [rise[i] for i in layers], marker="o", label=name)
    axes.axhline(0.0, color="gray", linewidth=0.8)
    axes.set(xlabel="layer", ylabel="rise of the loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def plot_throughput(cells: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Decoded tokens a second over the context, a line for each model and batch size.

    Args:
        cells: Rows with `model`, `batch`, `context` and `measured_tokens_per_second`.
        path: The picture to write.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[int, float]]] = {}
    for cell in cells:
        point = (cell["context"], cell["measured_tokens_per_second"])
        lines.setdefault(f"{cell['model']}, batch {cell['batch']}", []).append(point)
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set(xlabel="prompt (tokens)", ylabel="decoded tokens per second", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
