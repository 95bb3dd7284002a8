"""Adaptive margins of a Bradley-Terry reward model: how much of the predicted margin the loss asks for.

For `gram.discriminative` with margins in its data or in `margins`. Selected by the accuracy on held-out pairs: the loss
itself grows with the scale. A scale of 0 is the plain loss, so the comparison is in the grid.
"""

from __future__ import annotations

from typing import Any, Literal

from ray import tune

VALUES = (0.0, 0.25, 0.5, 1.0, 2.0)

METRIC = "accuracy"
MODE: Literal["min", "max"] = "max"
CURVES = ("accuracy", "ece", "nll")
"""Evaluation metrics drawn against the scale."""


def space(search: str) -> dict[str, Any]:
    """Dotted config key -> Tune domain: each of `VALUES` once for a grid, else all values between them."""
    scale = tune.grid_search(list(VALUES)) if search == "grid" else tune.uniform(VALUES[0], VALUES[-1])
    return {"loss.margin_scale": scale, "loss.use_margin": True, "loss.margin_form": "subtract"}
