"""Over-optimisation: the reward that a policy is trained on beside the gold reward that it never sees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Look(NamedTuple):
    """One look at the held-out prompts."""

    step: int
    reward: float
    gold: float


def looks(records: Sequence[dict[str, Any]], reward: str) -> list[Look]:
    """The evaluations in the metrics of a run that have a gold reward.

    Args:
        records: Lines of `metrics.jsonl`.
        reward: Name of the reward that is trained on.
    """
    return [
        Look(record["step"], record[f"rewards_{reward}_mean"], record["rewards_gold_mean"])
        for record in records
        if record["kind"] == "eval" and "rewards_gold_mean" in record
    ]


def over_optimisation(found: Sequence[Look]) -> dict[str, float]:
    """Both rewards at the start, where the gold reward was best (the first time) and at the end, and the step of the best.

    A `reward_end` above `reward_best` with a `gold_end` below `gold_best` is over-optimisation: the policy went on to learn
    the mistakes of its reward.
    """
    if not found:
        return {}
    best = max(found, key=lambda look: (look.gold, -look.step))
    points = {"start": found[0], "best": best, "end": found[-1]}
    return {
        **{f"gold_{name}": look.gold for name, look in points.items()},
        **{f"reward_{name}": look.reward for name, look in points.items()},
        "gold_best_step": best.step,
    }


def plot_rewards(found: Sequence[Look], path: Path) -> None:
    """Both rewards over the steps, each on an axis of its own, and where the gold reward was best."""
    from matplotlib.figure import Figure

    path.parent.mkdir(exist_ok=True)
    canvas = Figure(figsize=(7, 4), layout="constrained")
    axes = canvas.subplots()
    other = axes.twinx()
    steps = [look.step for look in found]
    lines = [
        *other.plot(steps, [look.reward for look in found], "--", color="C0", label="reward trained on"),
        *axes.plot(steps, [look.gold for look in found], color="C1", marker="o", label="gold reward"),
        axes.axvline(over_optimisation(found)["gold_best_step"], color="gray", ls=":", label="best gold"),
    ]
    axes.set(xlabel="step", ylabel="gold reward")
    other.set_ylabel("reward trained on")
    axes.legend(lines, [str(line.get_label()) for line in lines], fontsize="small")
    axes.grid(alpha=0.3)
    canvas.savefig(path, dpi=120)
