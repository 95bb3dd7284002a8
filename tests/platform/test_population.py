"""Population-based training: who takes over from whom, how values change, what is refused, what is remembered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import tune

from eagleray.platform.config import ConfigError
from eagleray.platform.population import (
    Exploit,
    Member,
    Population,
    check_population,
    describe_exploit,
    explore,
    first_members,
    next_members,
    segment_ends,
)
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import TrainingConfig, TrainSection
from eagleray.platform.space import SearchName, Space, SweepPlan

RATE = tune.loguniform(1e-4, 1e-1)
SPACE = Space("toy", {"optim.lr": RATE, "loss.kind": "two_way"}, "accuracy", "max")


def members(count: int) -> dict[str, Member]:
    """Trials 1, 2, ... with rates 0.01, 0.02, ..."""
    return {str(i): Member({"optim.lr": i / 100, "loss.kind": "two_way"}) for i in range(1, count + 1)}


def takeovers(scores: list[float | None], space: Space = SPACE) -> dict[str, str]:
    """Trial -> donor, for trials 1, 2, ... with these scores."""
    named = {str(i): score for i, score in enumerate(scores, start=1)}
    points, exploits = next_members(space, members(len(scores)), named, 10, seed=(0, 1))
    takers = {exploit.trial for exploit in exploits}
    for name, member in members(len(scores)).items():
        assert (points[name] == member.point) == (name not in takers)  # the others go on as they are
    return {exploit.trial: exploit.donor for exploit in exploits}


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.5, 0.9], {"1": "2"}),
        ([0.9, 0.6, 0.5], {"3": "1"}),
        ([0.6, 0.9, 0.5, 0.7], {"3": "2"}),
        ([0.6, None], {"2": "1"}),
        (
            [None, 0.6, None, None],
            {"1": "2", "3": "2", "4": "2"},
        ),  # all that failed, were they more than a quarter
        ([0.6, None, 0.9, 0.5], {"2": "3"}),  # the one that failed is the worst
    ],
)
def test_the_worse_quarter_takes_over_from_the_better(
    scores: list[float | None], expected: dict[str, str]
) -> None:
    assert takeovers(scores) == expected


def test_less_is_better_where_it_is() -> None:
    assert takeovers([0.5, 0.9], Space("toy", SPACE.domains, "nll", "min")) == {"2": "1"}


def test_a_quarter_of_eight_is_two() -> None:
    taken = takeovers([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    assert taken.keys() == {"1", "2"} and set(taken.values()) <= {"7", "8"}


def test_a_takeover_is_told_with_old_and_new_values_and_is_the_same_the_next_time() -> None:
    scores = {"1": 0.5, "2": 0.9}
    points, (exploit,) = next_members(SPACE, members(2), scores, 10, seed=(7, 1))
    again, _ = next_members(SPACE, members(2), scores, 10, seed=(7, 1))
    other, _ = next_members(SPACE, members(2), scores, 10, seed=(7, 2))
    assert points == again != other
    assert exploit.old == {"optim.lr": 0.01} and exploit.new == {"optim.lr": points["1"]["optim.lr"]}
    assert exploit.new["optim.lr"] != 0.02  # changed from the donor's
    assert describe_exploit(Exploit("1", "2", 10, {"optim.lr": 0.01}, {"optim.lr": 0.5})) == (
        "1 goes on from 2 with optim.lr 0.01 -> 0.5"
    )


def explored(domain: Any, value: Any) -> set[Any]:
    rng = np.random.RandomState(0)
    return {explore(domain, value, rng) for _ in range(200)}


def test_a_number_changes_by_a_fifth_or_is_drawn_anew() -> None:
    values = explored(RATE, 0.01)
    assert {0.008, 0.012} < values and 0.01 not in values
    assert all(1e-4 <= value <= 1e-1 for value in values)


@pytest.mark.parametrize(
    ("domain", "value", "expected"),
    [
        (tune.choice(["a", "b"]), "a", {"a", "b"}),  # the neighbour, or any when drawn anew
        (tune.grid_search([1, 2, 3, 4]), 1, {1, 2, 3, 4}),
        (tune.randint(9, 12), 10, {9, 10, 11}),  # 8 and 12 are outside
        (tune.quniform(0.1, 0.3, 0.1), 0.2, {0.1, 0.2, 0.3}),
        (tune.choice(["only"]), "only", {"only"}),
    ],
)
def test_values_stay_inside_their_domain(domain: Any, value: Any, expected: set[Any]) -> None:
    assert {round(v, 9) if isinstance(v, float) else v for v in explored(domain, value)} <= expected


def test_a_value_at_its_bound_turns_back() -> None:
    assert all(value < 0.1 for value in explored(tune.uniform(0.09, 0.1), 0.1))


@pytest.mark.parametrize(
    ("search", "domains", "samples", "count"),
    [
        ("grid", {"optim.lr": tune.grid_search([0.1, 0.2]), "optim.eps": tune.grid_search([1, 2])}, 1, 4),
        ("random", {"optim.lr": RATE, "optim.schedule": "linear"}, 3, 3),
    ],
)
def test_the_first_members(search: SearchName, domains: dict[str, Any], samples: int, count: int) -> None:
    plan = SweepPlan(
        print, TrainingConfig, {}, Space("toy", domains, "a", "max"), search, "pbt", samples, (3,)
    )
    first = first_members(plan)
    assert list(first) == [f"{i:04d}" for i in range(1, count + 1)]
    assert len({tuple(member.point.values()) for member in first.values()}) == count
    assert all(member.point.keys() == domains.keys() for member in first.values())
    assert first_members(plan) == first


@pytest.mark.parametrize(
    ("steps", "every", "ends"),
    [(10, 5, [5, 10]), (10, 4, [4, 8, 10]), (10, None, [3, 6, 9, 10]), (40, None, [10, 20, 30, 40])],
)
def test_segments(steps: int, every: int | None, ends: list[int]) -> None:
    assert segment_ends(TrainSection(max_steps=steps), every) == ends


def test_one_segment_is_no_population() -> None:
    with pytest.raises(ConfigError, match=r"`perturb_every` is 10 and a run has 10 steps.*Lower"):
        segment_ends(TrainSection(max_steps=10), 10)


@pytest.mark.parametrize(
    ("key", "train", "size", "message"),
    [
        ("optimx.lr", {"max_steps": 8}, 4, "`optimx.lr`, which cannot change in the middle of a run"),
        (
            "train.epochs",
            {"max_steps": 8},
            4,
            "`train.epochs`, which cannot change.*may vary `optim`, `loss`",
        ),
        ("optim.lr", {}, 4, "needs `train.max_steps`"),
        ("optim.lr", {"max_steps": 8, "patience": 2}, 4, "leave out `train.patience`"),
        ("optim.lr", {"max_steps": 8}, 1, "needs at least 2 trials"),
    ],
)
def test_refusals(key: str, train: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_population(Space("toy", {key: RATE}, "accuracy", "max"), TrainSection(**train), size=size)


@pytest.mark.parametrize("key", ["optim.lr", "loss.smoothing", "train.batch_size"])
def test_what_may_change(key: str) -> None:
    check_population(Space("toy", {key: RATE}, "accuracy", "max"), TrainSection(max_steps=8), size=2)


def test_decisions_are_remembered(tmp_path: Path) -> None:
    assert Population.load(RunFolder(tmp_path)) == Population()
    population = Population([members(2)], [Exploit("1", "2", 5, {"optim.lr": 0.1}, {"optim.lr": 0.2})])
    population.segments.append({"1": Member({"optim.lr": 0.2}, "/somewhere/step-00000005")})
    population.save(RunFolder(tmp_path))
    assert Population.load(RunFolder(tmp_path)) == population
