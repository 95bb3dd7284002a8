"""Sweeps: what is refused before anything starts, what fits the cluster, when ASHA looks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import tune
from ray.tune.experiment import Experiment
from ray.tune.schedulers import TrialScheduler

from eagleray.platform import tuning
from eagleray.platform.config import Config, ConfigError
from eagleray.platform.sections import RaySection, TrainingConfig, TrainSection
from eagleray.platform.tuning import (
    SEED_KEY,
    SearchName,
    Space,
    SweepPlan,
    build_scheduler,
    check_space,
    evaluations,
    number_of_trials,
    trial_config,
    trials_at_once,
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
    ("nodes", "section", "expected"),
    [
        ([{"CPU": 8}], RaySection(num_workers=2), 4),
        ([{"CPU": 8}], RaySection(num_workers=3), 2),
        (
            [{"CPU": 3}, {"CPU": 3}],
            RaySection(num_workers=1, cpus_per_worker=2),
            2,
        ),  # a worker never spans nodes
        ([{"CPU": 64, "GPU": 4}], RaySection(num_workers=2, cpus_per_worker=8), 2),  # GPUs are what is short
        ([{"CPU": 64, "GPU": 1}], RaySection(num_workers=2, cpus_per_worker=8), 4),  # too few: none is used
        ([{"CPU": 1}], RaySection(num_workers=2), 0),
    ],
)
def test_how_many_trials_fit(
    nodes: list[dict[str, float]], section: RaySection, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    dead = {"Alive": False, "Resources": {"CPU": 1000}}
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)
    monkeypatch.setattr(ray, "nodes", lambda: [dead, *({"Alive": True, "Resources": n} for n in nodes)])
    assert trials_at_once(section) == expected


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (TrainSection(max_steps=20, eval_every=10), 2),
        (TrainSection(max_steps=21, eval_every=10), 3),  # the last step is evaluated too
        (TrainSection(max_steps=100), 10),
        (TrainSection(max_steps=5), 5),
        (TrainSection(epochs=2), 10),
        (TrainSection(epochs=2, eval_every=100), None),
    ],
)
def test_evaluations_of_a_run(train: TrainSection, expected: int | None) -> None:
    assert evaluations(train) == expected


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


def draw(plan: SweepPlan, count: int) -> list[tuple[float, int]]:
    """Learning rate and seed of the first trials, as Tune draws them."""
    search = tuning._search_options(plan, max_concurrent=4)["search_alg"]
    param_space = tuning._param_space(plan)
    search.add_configurations(
        [Experiment("toy", lambda _: None, config=param_space, num_samples=plan.samples)]
    )
    trials = [search.next_trial() for _ in range(count)]
    return [(trial.config["optim.lr"], trial.config[SEED_KEY]) for trial in trials]


def test_random_points_are_the_same_for_all_seeds_and_the_next_time() -> None:
    rates = space({"optim.lr": tune.uniform(0, 1)})
    plan = SweepPlan(print, ToyConfig, {}, rates, "random", "none", samples=2, seeds=(3, 4))
    drawn = draw(plan, 4)
    (a, _), (b, _), (c, _), (d, _) = drawn
    assert a == b != c == d
    assert [seed for _, seed in drawn] == [3, 4, 3, 4]
    assert draw(plan, 4) == drawn


def stops(train: TrainSection) -> list[int]:
    """Evaluations at which ASHA stops a trial that is the worst of three."""
    scheduler = build_scheduler("asha", train)
    assert scheduler is not None
    scheduler.set_search_properties("accuracy", "max")
    trials: list[Any] = [SimpleNamespace(trial_id=str(i)) for i in range(3)]
    for trial in trials:
        scheduler.on_trial_add(None, trial)  # pyright: ignore[reportArgumentType]
    stopped = []
    for look in range(1, (evaluations(train) or 40) + 1):
        for trial, accuracy in zip(trials, (0.9, 0.8, 0.1), strict=True):
            result = {"training_iteration": look, "accuracy": accuracy}
            decision = scheduler.on_trial_result(None, trial, result)  # pyright: ignore[reportArgumentType]
        if decision == TrialScheduler.STOP:
            stopped.append(look)
    return stopped


@pytest.mark.parametrize(
    ("train", "looks"),
    [
        (TrainSection(max_steps=100), [1, 2, 4, 8]),
        (
            TrainSection(max_steps=80, eval_every=10),
            [1, 2, 4],
        ),  # not the 8th and last: the run is about to end
        (TrainSection(max_steps=20, eval_every=10), [1]),
        (TrainSection(epochs=1, eval_every=5), [1, 2, 4, 8, 16, 32]),
    ],
)
def test_asha_looks_at_doubling_distances_but_never_at_the_end(train: TrainSection, looks: list[int]) -> None:
    assert stops(train) == looks


def test_asha_needs_two_evaluations() -> None:
    with pytest.raises(ConfigError, match=r"compares trials at their evaluations.*`train.eval_every`"):
        build_scheduler("asha", TrainSection(max_steps=10, eval_every=10))


def test_no_scheduler() -> None:
    assert build_scheduler("none", TrainSection(max_steps=10, eval_every=10)) is None
