"""Spaces: what is refused before anything starts, the point of a trial, objectives."""

from __future__ import annotations

from typing import Any

import pytest
from ray import tune

from eagleray.platform.config import Config, ConfigError
from eagleray.platform.sections import TrainingConfig
from eagleray.platform.space import (
    Objective,
    SearchName,
    Space,
    SweepPlan,
    check_space,
    number_of_trials,
    trial_config,
)


class LossSection(Config):
    smoothing: float = 0.1
    kind: str = "two_way"


class ToyConfig(TrainingConfig):
    loss: LossSection = LossSection()


def space(domains: dict[str, Any], *, metric: str = "accuracy") -> Space:
    return Space("toy", domains, metric, "max")


def grid(*values: Any) -> Any:
    return tune.grid_search(list(values))


def check(domains: dict[str, Any], *, search: SearchName = "grid", metric: str = "accuracy") -> None:
    check_space(space(domains, metric=metric), ToyConfig, {}, search=search)


def test_fixed_values_are_not_varied() -> None:
    assert space({"optim.lr": grid(1e-3), "loss.kind": "two_way"}).varied == ["optim.lr"]


@pytest.mark.parametrize(
    ("domains", "search"),
    [
        ({"loss.smoothing": grid(0.0, 0.1), "loss.kind": "two_way"}, "grid"),
        ({"optim.lr": tune.loguniform(1e-5, 1e-2), "train.batch_size": tune.choice([8, 16])}, "random"),
        ({"lora.rank": tune.randint(1, 64)}, "optuna"),  # the section is null in the config
    ],
)
def test_a_good_space_passes(domains: dict[str, Any], search: SearchName) -> None:
    check(domains, search=search)


def test_an_unknown_key_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"(?s)space `toy`.*unknown key `loss.smothing`.*`loss.smoothing`"):
        check({"loss.smothing": grid(0.1)})


@pytest.mark.parametrize(
    ("domains", "search"),
    [
        ({"optim.lr": grid(1e-3, 1e-2, -1.0)}, "grid"),  # the last of a grid
        ({"train.precision": tune.choice(["fp32", "fp64"])}, "random"),  # one of a choice
        ({"optim.lr": tune.uniform(-1.0, 1.0)}, "optuna"),  # a part of a range
    ],
)
def test_values_that_the_config_does_not_allow(domains: dict[str, Any], search: SearchName) -> None:
    key = next(iter(domains))
    with pytest.raises(ConfigError, match=f"space `toy`.*\n.*`{key}`"):
        check(domains, search=search)


def test_values_must_fit_together() -> None:
    with pytest.raises(ConfigError, match=r"`train.batch_size` is 12; it must be a multiple"):
        check({"train.batch_size": grid(8, 12), "train.micro_batch_size": 8})


@pytest.mark.parametrize("metric", ["loss", "eval_loss", "eval/loss"])
def test_a_loss_does_not_select_among_losses(metric: str) -> None:
    with pytest.raises(ConfigError, match=f"`{metric}` and varies `loss.smoothing`.*cannot be compared"):
        check({"loss.smoothing": grid(0.0, 0.1)}, metric=metric)


def test_a_loss_may_select_among_learning_rates() -> None:
    check({"optim.lr": grid(1e-3, 1e-2), "loss.kind": "two_way"}, metric="loss")


def test_a_range_needs_a_search_that_draws() -> None:
    with pytest.raises(ConfigError, match=r"`optim.lr` has no grid"):
        check({"optim.lr": tune.uniform(0.1, 0.2), "train.seed": grid(0, 1)})


def test_a_grid_cannot_be_drawn_from() -> None:
    with pytest.raises(ConfigError, match=r"`optim.lr` is a grid, which only `search` grid"):
        check({"optim.lr": grid(0.1)}, search="optuna")


def test_a_space_varies_something() -> None:
    with pytest.raises(ConfigError, match="nothing varies"):
        check({"loss.kind": "two_way"})


def test_a_trial_gets_its_point_and_the_base_stays_as_it_is() -> None:
    base = {"optim": {"lr": 0.5, "eps": 1e-7}, "lora": None}
    cfg = trial_config(ToyConfig, base, {"optim.lr": 0.25, "lora.rank": 4}, source="trial")
    assert cfg.lora is not None
    assert (cfg.optim.lr, cfg.optim.eps, cfg.lora.rank) == (0.25, 1e-7, 4)
    assert base == {"optim": {"lr": 0.5, "eps": 1e-7}, "lora": None}


@pytest.mark.parametrize(
    ("domains", "search", "samples", "seeds", "expected"),
    [
        (
            {"optim.lr": grid(1, 2, 3), "train.precision": grid("a", "b"), "loss.kind": "c"},
            "grid",
            1,
            (0,),
            6,
        ),
        ({"optim.lr": grid(1, 2, 3)}, "grid", 1, (0, 1), 6),
        ({"optim.lr": tune.uniform(0, 1)}, "random", 4, (0, 1, 2), 12),
    ],
)
def test_number_of_trials(
    domains: dict[str, Any], search: SearchName, samples: int, seeds: tuple[int, ...], expected: int
) -> None:
    plan = SweepPlan(print, ToyConfig, {}, space(domains), search, "none", samples, seeds)
    assert number_of_trials(plan) == expected


def test_objectives() -> None:
    judged = space({}).judged_by([Objective.parse("eval:loss:min"), Objective.parse("cost:max")])
    assert (judged.metric, judged.mode) == ("eval:loss", "min")
    assert [(o.metric, o.sign) for o in judged.objectives] == [("eval:loss", 1), ("cost", -1)]
    assert space({}).judged_by([]).objectives == (Objective("accuracy", "max"),)


@pytest.mark.parametrize("text", ["accuracy", "accuracy:best", ":max", ""])
def test_a_broken_objective(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not of the form metric:max or metric:min"):
        Objective.parse(text)
