"""Label smoothing of a pairwise judge: how much the loss trusts the labels.

Values are in the torch convention, where the wrong one of two labels gets half of them; the space sets that
convention, so that a value means the same whatever the config says. Selected by the accuracy on held-out
pairs: a smoothed loss has another least value for every smoothing and cannot be compared.
"""

from __future__ import annotations

from typing import Any, Literal

from ray import tune

VALUES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
"""From the plain ranking loss, over what the paper's release recommends (0.05 to 0.15), to too much."""

METRIC = "accuracy"
MODE: Literal["min", "max"] = "max"
CURVES = ("accuracy", "ece", "nll")
"""Evaluation metrics drawn against the smoothing."""


def space(search: str) -> dict[str, Any]:
    """Dotted config key -> Tune domain: each of `VALUES` once for a grid, else all values between them."""
    smoothing = tune.grid_search(list(VALUES)) if search == "grid" else tune.uniform(VALUES[0], VALUES[-1])
    return {"loss.smoothing": smoothing, "loss.convention": "torch"}
