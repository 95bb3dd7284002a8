"""Several objectives: the front of made-up results, by hand and against its definition."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from matplotlib.image import imread

from eagleray.platform.pareto import pareto_front, plot_pareto
from eagleray.platform.space import Objective

ACCURATE, CHEAP, SMALL = Objective("accuracy", "max"), Objective("cost", "min"), Objective("size", "min")


def test_the_front_by_hand() -> None:
    """c is beaten by b (more accurate and cheaper), e by d (as accurate, cheaper); f lacks a value."""
    points = {"a": (0.7, 1), "b": (0.8, 2), "c": (0.75, 3), "d": (0.9, 5), "e": (0.9, 6), "f": (0.99, None)}
    rows = [{"accuracy": accuracy, "cost": cost} for accuracy, cost in points.values()]
    front = pareto_front(rows, [ACCURATE, CHEAP])
    assert [list(points)[i] for i in front] == ["d", "b", "a"]  # the most accurate first


def test_equal_rows_are_both_on_the_front() -> None:
    assert pareto_front([{"accuracy": 0.5, "cost": 1}] * 2, [ACCURATE, CHEAP]) == [0, 1]


def test_one_objective_has_its_best_as_front() -> None:
    assert pareto_front([{"accuracy": 0.5}, {"accuracy": 0.9}, {"accuracy": 0.7}], [ACCURATE]) == [1]


def test_nothing_measured() -> None:
    assert pareto_front([], [ACCURATE]) == pareto_front([{"cost": 1}], [ACCURATE, CHEAP]) == []


@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_on_the_front_or_beaten_by_one_that_is(seed: int) -> None:
    rng = random.Random(seed)
    rows = [
        {"accuracy": rng.randint(0, 9), "cost": rng.randint(0, 9), "size": rng.randint(0, 9)}
        for _ in range(40)
    ]
    front = pareto_front(rows, [ACCURATE, CHEAP, SMALL])

    def beats(a: dict[str, int], b: dict[str, int]) -> bool:
        better = (a["accuracy"] - b["accuracy"], b["cost"] - a["cost"], b["size"] - a["size"])
        return min(better) >= 0 and max(better) > 0

    for i, row in enumerate(rows):
        assert (i in front) != any(beats(rows[k], row) for k in front)


def test_a_panel_a_pair(tmp_path: Path) -> None:
    rows = [{"accuracy": 0.5 + i / 10, "cost": i, "size": 3 - i} for i in range(3)]
    names = ["a", "b", "c"]
    one = plot_pareto(rows, [ACCURATE, CHEAP], tmp_path / "one.png", names=names)
    three = plot_pareto(rows, [ACCURATE, CHEAP, SMALL], tmp_path / "three.png", names=names)
    assert imread(three).shape[1] == 3 * imread(one).shape[1]
