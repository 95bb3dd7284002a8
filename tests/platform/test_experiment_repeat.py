"""Repeated stages: which there are, what they refer to, what is put together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eagleray.platform.config import ConfigError
from eagleray.platform.experiment import Definition, plan_stages
from eagleray.platform.experiment_repeat import grouped, repeat, repetitions

SEEDS: dict[str, list[Any]] = {"seed": [0, 1]}
BOTH = {"share": [0.5, 0.8], **SEEDS}


def _repeated(evaluate: Definition, each: dict[str, list[Any]]) -> dict[str, Definition]:
    """start -> train (a share, a seed) -> evaluate."""
    definitions = {
        "start": Definition("toy.start", {}),
        "train": Definition(
            "toy.train", {"model": "${start}/model", "share": "${share}", "note": "run ${seed}"}
        ),
        "evaluate": evaluate,
    }
    return repeat(definitions, repetitions({"start": {}, "train": BOTH, "evaluate": each}))


def test_a_stage_is_repeated_for_all_combinations(tmp_path: Path) -> None:
    """Values keep their type where they stand alone; a reference is to the stage of the same values."""
    found = _repeated(Definition("toy.evaluate", {"model": "${train}/model"}), BOTH)
    names = [
        f"{stage}-{share}-{seed}"
        for stage in ("train", "evaluate")
        for share in (0.5, 0.8)
        for seed in (0, 1)
    ]
    assert list(found) == ["start", *names]
    assert found["train-0.8-1"].values == {"model": "${start}/model", "share": 0.8, "note": "run 1"}
    assert found["evaluate-0.5-1"].values == {"model": "${train-0.5-1}/model"}
    stages = {stage.name: stage for stage in plan_stages(found, tmp_path)}
    assert stages["evaluate-0.5-1"].values["model"] == f"{stages['train-0.5-1'].folder}/model"
    assert len({stage.key for stage in stages.values()}) == 9


def test_one_repetition_can_be_named_and_all_can_be_waited_for() -> None:
    found = _repeated(Definition("toy.evaluate", {"model": "${train-0.8-0}/model"}, after=("train",)), {})
    assert found["evaluate"].needs == ("train-0.5-0", "train-0.5-1", "train-0.8-0", "train-0.8-1")
    by_share = _repeated(Definition("toy.evaluate", {}, after=("train",)), {"share": [0.8]})
    assert by_share["evaluate-0.8"].needs == ("train-0.8-0", "train-0.8-1")


def test_mistakes_say_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"`train`, which is repeated over seed\. Name one.*`\$\{train-0.5-0\}`, or"
    ):
        _repeated(Definition("toy.evaluate", {"model": "${train}/model"}), {"share": [0.5]})
    with pytest.raises(ConfigError, match=r"refers to a stage `train`.*mean `train-0"):
        unknown = _repeated(Definition("toy.evaluate", {"model": "${train}/model"}), {"share": [0.6]})
        plan_stages(unknown, tmp_path)
    with pytest.raises(ConfigError, match=r"`stages.a` makes a stage `a-1`, which there is already"):
        repetitions({"a": {"seed": [1, 1]}})
    with pytest.raises(ConfigError, match=r"`stages.a.each.b` has the name of a stage"):
        repetitions({"a": {"b": [1]}, "b": {}})


def test_groups_are_over_what_they_differ_in() -> None:
    found = repetitions({"start": {}, "train": BOTH})
    assert grouped(found, "train", ["seed"]) == [
        ({"share": 0.5}, ["train-0.5-0", "train-0.5-1"]),
        ({"share": 0.8}, ["train-0.8-0", "train-0.8-1"]),
    ]
    assert len(grouped(found, "train", [])) == 4 and len(grouped(found, "train", ["seed", "share"])) == 1
    assert grouped(found, "train-0.5-1", []) == [({"share": 0.5, "seed": 1}, ["train-0.5-1"])]
    assert grouped(found, "start", []) == [({}, ["start"])] and not grouped(found, "trian", [])
