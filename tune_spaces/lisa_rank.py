"""Rank of the low-rank queries and keys of layers that share attention scores (`lisa.train`).

Selected by the distance to the teacher's attention on held-out text, which is the same quantity at every rank. Ranks
at which scores would take more arithmetic than full ones are refused before any trial runs; narrow the space for models
with small heads by giving `share.align.width` or a smaller `VALUES`.
"""

from __future__ import annotations

from typing import Any, Literal

from ray import tune

VALUES = (0, 4, 8, 12, 16, 20, 24, 32)
"""From alignment alone to a quarter of a head of 128; even, because rotary codes turn pairs."""

METRIC = "distance"
MODE: Literal["min", "max"] = "min"
CURVES = ("distance",)
"""Evaluation metrics drawn against the rank."""


def space(search: str) -> dict[str, Any]:
    """Dotted config key -> Tune domain: each of `VALUES` once for a grid, else one of them."""
    rank = tune.grid_search(list(VALUES)) if search == "grid" else tune.choice(list(VALUES))
    return {"share.rank": rank, "share.rope": "pairs"}
