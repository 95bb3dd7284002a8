"""CTC-NAST: how much of the best alignment training is told, how much the inner layers count, and where they stand.

The inner target layer is a choice among the lower layers of a small textual encoder; a deeper one wants its own list.
Selected by BLEU on the development set, which means the same whatever the loss is.
"""

from __future__ import annotations

from typing import Any, Literal

from ray import tune

RATIOS = (0.0, 0.1, 0.5, 0.8)
"""Chance that a frame is told its label: off, and what the released recipes use."""
INNER_WEIGHTS = (0.5, 1.0)
"""Weight of the mean CTC of the inner layers; the paper has 1."""
INNER_LAYERS = ([1], [2], [1, 2])
"""Textual layers with a CTC of their own, of at least three."""

METRIC = "bleu"
MODE: Literal["min", "max"] = "max"
CURVES = ("bleu", "exact_match", "source_wer")
"""Evaluation metrics drawn against the first setting."""


def space(search: str) -> dict[str, Any]:
    """Dotted config key -> Tune domain: every combination once for a grid, else draws from the same ranges."""
    if search == "grid":
        return {
            "loss.curriculum.ratio": tune.grid_search(list(RATIOS)),
            "loss.inner_target": tune.grid_search(list(INNER_WEIGHTS)),
            "model.inner_target_layers": tune.grid_search([list(layers) for layers in INNER_LAYERS]),
        }
    return {
        "loss.curriculum.ratio": tune.uniform(RATIOS[0], RATIOS[-1]),
        "loss.inner_target": tune.uniform(0.0, 2.0),
        "model.inner_target_layers": tune.choice([list(layers) for layers in INNER_LAYERS]),
    }
