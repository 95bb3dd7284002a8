"""Learning rate and batch size, of any training job, judged by the job's own metric.

With `train.max_steps` a larger batch sees more examples; give `train.epochs` to compare at equal examples.
"""

from __future__ import annotations

from typing import Any

from ray import tune

LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
"""From fine-tuning a large model to training a small one from random weights."""

BATCH_SIZES = (16, 32, 64)
"""Multiples of `ray.num_workers` x `train.micro_batch_size` in the shipped configs."""


def space(search: str) -> dict[str, Any]:
    """Dotted config key -> Tune domain: the grid of both lists, else any rate between the ends."""
    if search == "grid":
        return {
            "optim.lr": tune.grid_search(list(LEARNING_RATES)),
            "train.batch_size": tune.grid_search(list(BATCH_SIZES)),
        }
    return {
        "optim.lr": tune.loguniform(LEARNING_RATES[0], LEARNING_RATES[-1]),
        "train.batch_size": tune.choice(list(BATCH_SIZES)),
    }
