"""Sweeps: which points are drawn, when ASHA looks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import tune
from ray.tune.experiment import Experiment
from ray.tune.schedulers import TrialScheduler

from eagleray.platform import tuning
from eagleray.platform.config import ConfigError
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import JobConfig, RunSection, TrainingConfig, TrainSection
from eagleray.platform.space import SEED_KEY, Space, SweepPlan
from eagleray.platform.tuning import build_scheduler, evaluations


def space(domains: dict[str, Any], *, metric: str = "accuracy") -> Space:
    return Space("toy", domains, metric, "max")


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


def draw(plan: SweepPlan, count: int) -> list[tuple[float, int]]:
    """Learning rate and seed of the first trials, as Tune draws them."""
    search = tuning._search_options(plan, 4, "nowhere")["search_alg"]
    param_space = tuning._param_space(plan)
    search.add_configurations(
        [Experiment("toy", lambda _: None, config=param_space, num_samples=plan.samples)]
    )
    trials = [search.next_trial() for _ in range(count)]
    return [(trial.config["optim.lr"], trial.config[SEED_KEY]) for trial in trials]


def test_random_points_are_the_same_for_all_seeds_and_the_next_time() -> None:
    rates = space({"optim.lr": tune.uniform(0, 1)})
    plan = SweepPlan(print, TrainingConfig, {}, rates, "random", "none", samples=2, seeds=(3, 4))
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
    stopped, decision = [], TrialScheduler.CONTINUE
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


def leave_trial(run_dir: Path, *, status: str = "running", checkpoint: int | None = None) -> None:
    """A trial's folder as a killed sweep leaves it: evaluated at steps 4, 8 and 12."""
    run = RunFolder.create("toy", JobConfig(run=RunSection(dir=str(run_dir))))
    run.close()
    run.update_manifest(status=status)
    records = [{"step": step, "kind": "eval", "time": 1.0, "accuracy": step / 100} for step in (4, 8, 12)]
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    for step in (4, checkpoint or 4):
        (run.checkpoints / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
    (run.checkpoints / "step-00000012.partial").mkdir()


def test_a_resumed_trial_tells_what_it_had_evaluated_up_to_where_it_goes_on(tmp_path: Path) -> None:
    """Schedulers count evaluations; those after the checkpoint will be done again."""
    assert tuning._earlier_evaluations(f"{tmp_path}/new") == []
    leave_trial(tmp_path / "half", checkpoint=8)
    assert tuning._earlier_evaluations(f"{tmp_path}/half") == [
        {"step": 4, "accuracy": 0.04},
        {"step": 8, "accuracy": 0.08},
    ]
    assert not tuning._ended(f"{tmp_path}/half")


@pytest.mark.parametrize("stopped", [False, True])
def test_a_trial_that_ended_tells_all_and_is_left_alone(tmp_path: Path, stopped: bool) -> None:
    leave_trial(tmp_path / "0001", status="running" if stopped else "finished")
    if stopped:
        watcher = tuning._Watcher(space({}), SimpleNamespace(), str(tmp_path))  # pyright: ignore[reportArgumentType]
        watcher.on_trial_complete(1, [], "0001")  # pyright: ignore[reportArgumentType]
    assert tuning._ended(f"{tmp_path}/0001")
    assert [record["step"] for record in tuning._earlier_evaluations(f"{tmp_path}/0001")] == [4, 8, 12]


def test_optuna_is_given_the_points_that_it_had_chosen(tmp_path: Path) -> None:
    """Trial 2 was killed before it had written its config: some point of the space takes its place."""
    plan = SweepPlan(
        print, TrainingConfig, {}, space({"optim.lr": tune.uniform(0, 1)}), "optuna", "none", 4, (0,)
    )
    assert tuning._earlier_points(plan, str(tmp_path)) == []
    for name, rate in (("0001", 0.25), ("0003", 0.75)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"optim: {{lr: {rate}}}")
    (tmp_path / ".DS_Store").touch()  # whatever else lies there
    points = tuning._earlier_points(plan, str(tmp_path))
    assert [point["optim.lr"] for point in points[::2]] == [0.25, 0.75]
    assert len(points) == 3 and 0 < points[1]["optim.lr"] < 1
