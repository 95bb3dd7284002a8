"""Over-optimisation, by hand."""

from __future__ import annotations

from eagleray.jobs.align.watch import Look, looks, over_optimisation


def test_over_optimisation_by_hand() -> None:
    """The reward goes on rising after the gold reward was best for the first time."""
    golds = {0: 0.2, 10: 0.6, 20: 0.6, 30: 0.4}
    records = [
        {"kind": "eval", "step": step, "rewards_gram_mean": step / 10, "rewards_gold_mean": gold}
        for step, gold in golds.items()
    ]
    found = looks([*records, {"kind": "train", "step": 31}, {"kind": "eval", "step": 40}], "gram")
    assert found[1] == Look(10, 1.0, 0.6) and len(found) == 4
    assert over_optimisation(found) == {
        "gold_start": 0.2,
        "gold_best": 0.6,
        "gold_best_step": 10,
        "gold_end": 0.4,
        "reward_start": 0.0,
        "reward_best": 1.0,
        "reward_end": 3.0,
    }
    assert over_optimisation([]) == {}
