"""How layers share attention scores (`lisa.train`): the rank of low-rank queries and keys, and all that it depends on.

A grid tries ranks alone. Other searches also choose how many layers share, the form of the alignment, the rotary code
and the low-rank key heads. Selected by the language-model loss of the whole student on held-out text, which is the same
function of every point; its cache is the second objective. Which ranks there are depends on the model: those at which
scores would take more arithmetic than full ones are left out before any trial runs.
"""

from __future__ import annotations

from typing import Any, Literal

from ray import tune

VALUES = (0, 2, 4, 8, 12, 16, 20, 24, 32, 48)
"""From alignment alone to what no head of 128 bears beside an alignment of 32 heads; even, as rotary codes turn pairs."""
FRACTIONS = (0.3, 0.4, 0.53, 0.69, 0.84)
"""Share of the layers; the paper's range is 0.53 to 0.84."""
ALIGNMENTS = ("linear", "linear+ffn", "ffn_res", "identity")
ROPES = ("pairs", "scaled", "none")
KEY_HEADS = (None, 1)
"""As many as the model has KV heads, or one for all."""

METRIC = "language_model"
MODE: Literal["min", "max"] = "min"
FURTHER = ("cache_values_per_token:min", "decode_mflops:min")
"""Objectives beside it."""
CURVES = ("language_model", "distance")
"""Evaluation metrics drawn against the rank."""
LIMITED_BY_MODEL = "share.rank"
"""Key whose values the model may not bear."""


def space(search: str) -> dict[str, Any]:
    """Dotted config key -> Tune domain: each of `VALUES` once for a grid, else draws from all of the above."""
    if search == "grid":
        return {"share.rank": tune.grid_search(list(VALUES)), "share.rope": "pairs"}
    return {
        "share.rank": tune.choice(list(VALUES)),
        "share.fraction": tune.choice(list(FRACTIONS)),
        "share.align.kind": tune.choice(list(ALIGNMENTS)),
        "share.align.width": None,  # what each form takes by itself; not all have one
        "share.rope": tune.choice(list(ROPES)),
        "share.key_heads": tune.choice(list(KEY_HEADS)),
    }
