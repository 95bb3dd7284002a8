"""The graph of an experiment, and what makes a stage another one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from eagleray.platform.config import ConfigError
from eagleray.platform.experiment import Definition, Stage, merged, plan_stages, run_order, substitute
from eagleray.platform.experiment_run import Need, makespan, startable


def _chain(**train: Any) -> dict[str, Definition]:
    return {
        "evaluate": Definition("toy.evaluate", {"model": "${train}/model", "data": "test.jsonl"}),
        "train": Definition("toy.train", {"model": {"path": "${start}/model"}, **train}),
        "start": Definition("toy.start", {"seed": 1}),
        "other": Definition("toy.start", {"seed": 2}),
    }


def _keys(definitions: dict[str, Definition], root: Path) -> dict[str, str]:
    return {stage.name: stage.key for stage in plan_stages(definitions, root)}


def test_stages_come_after_what_they_need_and_see_its_folder(tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in plan_stages(_chain(), tmp_path)}
    assert list(stages) == ["start", "other", "train", "evaluate"]
    train = stages["train"]
    assert train.values["model"]["path"] == f"{stages['start'].folder}/model"
    assert train.values["run"]["dir"] == str(train.folder)
    assert train.reads == (stages["start"].folder / "model",)
    assert train.folder.parent == tmp_path / "stages" and train.folder.name == f"train-{train.key[:12]}"


def test_what_changes_a_stage_changes_all_that_depends_on_it_and_nothing_else(tmp_path: Path) -> None:
    before, after = _keys(_chain(), tmp_path), _keys(_chain(lr=0.1), tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"train", "evaluate"}


def test_keys_do_not_depend_on_the_place_nor_on_what_a_run_may_change(tmp_path: Path) -> None:
    free = {"run": {"note": "again"}, "ray": {"num_workers": 4}, "tracking": {"tensorboard": False}}
    assert _keys(_chain(), tmp_path / "a") == _keys(_chain(**free), tmp_path / "b")


def test_order_without_a_reference_counts_too(tmp_path: Path) -> None:
    definitions = {"a": Definition("x", {"n": 1}), "b": Definition("y", {}, after=("a",))}
    changed = {**definitions, "a": Definition("x", {"n": 2})}
    assert _keys(definitions, tmp_path)["b"] != _keys(changed, tmp_path)["b"]


@pytest.mark.parametrize("named", ["rows.jsonl", "rows", "ro*/*.jsonl"])
def test_files_count_by_their_content(named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, a folder, a pattern: another content is another key, another time of writing is not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    files = [tmp_path / "rows.jsonl", tmp_path / "rows" / "part.jsonl"]
    for file in files:
        file.write_text("one")
    definitions = {"a": Definition("x", {"data": [{"path": named}]})}
    first = _keys(definitions, tmp_path / "e")
    for file in files:
        os.utime(file, ns=(1, 1))
    assert _keys(definitions, tmp_path / "e") == first
    for file in files:
        file.write_text("two")
    assert _keys(definitions, tmp_path / "e") != first


def test_a_folder_around_the_experiment_or_the_working_folder_is_not_hashed(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`path: .` beside a `root` means another place, and runs write below the working folder."""
    monkeypatch.chdir(tmp_path)
    definitions = {"a": Definition("x", {"path": "."})}
    roots = (tmp_path / "e", tmp_path_factory.mktemp("elsewhere"))
    first = [_keys(definitions, root) for root in roots]
    (tmp_path / "new").write_text("text")
    assert [_keys(definitions, root) for root in roots] == first


def test_unknown_references_name_the_nearest_stage(tmp_path: Path) -> None:
    definitions = {"train": Definition("x", {}), "evaluate": Definition("y", {"model": "${trian}/model"})}
    with pytest.raises(ConfigError, match=r"`stages.evaluate` refers to a stage `trian`.*mean `train`"):
        plan_stages(definitions, tmp_path)


def test_circles_are_named() -> None:
    """An arrow means: waits for."""
    with pytest.raises(
        ConfigError, match=r"in a circle: (a -> c -> b -> a|c -> b -> a -> c|b -> a -> c -> b)"
    ):
        run_order({"a": ("c",), "b": ("a",), "c": ("b",), "d": ()})


def test_merging_replaces_lists_and_nulls_but_enters_sections() -> None:
    base = {"data": {"train": [1, 2], "limit": 3}, "scratch": {"width": 4}}
    over = {"data": {"train": [5]}, "scratch": None, "model": {"path": "m"}}
    expected = {"data": {"train": [5], "limit": 3}, "scratch": None, "model": {"path": "m"}}
    assert merged(base, over) == expected
    assert substitute(["${a}-${b}", 1, "${b}"], {"a": "x", "b": 2.5}) == ["x-2.5", 1, 2.5]


def _stages(**needs: tuple[str, ...]) -> list[Stage]:
    return [Stage(name, "x", {}, need, (), name, Path(name)) for name, need in needs.items()]


def test_what_can_start_fits_beside_what_runs() -> None:
    """Two cores: one stage of one core beside another; one that asks for more than is free waits, others pass it."""
    stages = _stages(big=(), small=(), later=("big",))
    needs = {"big": Need(2), "small": Need(1), "later": Need(1)}
    names = [s.name for s in startable(stages, {}, [Need(1)], needs, Need(2))]
    assert names == ["small"]
    assert [s.name for s in startable(stages, {}, [], needs, Need(2))] == ["big"]
    # Alone, a stage starts even if it asks for more than there is: the job itself then says what is missing.
    assert [s.name for s in startable(stages[:1], {}, [], {"big": Need(3)}, Need(2))] == ["big"]


def test_makespan_by_hand() -> None:
    """a (3 s) beside b (1 s), then c (2 s) once b is done, d (1 s) after a and c: 4 s on two cores, 7 s on one."""
    stages = _stages(a=(), b=(), c=("b",), d=("a", "c"))
    seconds = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 1.0}
    needs = dict.fromkeys(seconds, Need(1))
    assert makespan(stages, seconds, needs, Need(2)) == 4
    assert makespan(stages, seconds, needs, Need(1)) == 7
    assert makespan(stages, {"c": 2.0}, needs, Need(2)) == 2
