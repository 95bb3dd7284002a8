"""How many labels a judge or reward model needs: the curve of a task adaptation (GRAM section 7).

Sweep it twice, once from a GRAM model and once from the backbone it came from, and lay the curves side by side. A smaller
set lies in every larger one. Selected by the accuracy on held-out pairs, which is the curve.
"""

from __future__ import annotations

from typing import Any, Literal

from ray import tune

VALUES = (100, 300, 1000, 3000)
"""Labelled pairs, about evenly spaced in the logarithm; the paper's are 1,000 to 10,000."""

METRIC = "accuracy"
MODE: Literal["min", "max"] = "max"
CURVES = ("accuracy", "nll")
"""Evaluation metrics drawn against the number of labels."""


def space(search: str) -> dict[str, Any]:
    """Dotted config key -> Tune domain: each of `VALUES` once for a grid, else all numbers between them."""
    if search == "grid":
        return {"data.limit": tune.grid_search(list(VALUES))}
    return {"data.limit": tune.lograndint(VALUES[0], VALUES[-1] + 1)}
