"""Selection inside the chain of phases: backwards, resumable, its baselines by configuration; training itself is stood in for."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from rovrm_cases import tiny_llava

from eagleray.jobs import encoding
from eagleray.jobs.rovrm import progressive, train
from eagleray.jobs.rovrm.data import VisualData, load_parts
from eagleray.models.rovrm.checkpoint import PhaseRecord, save_reward_model, weights_sha256
from eagleray.platform.config import ConfigError, load_config
from eagleray.platform.data.sources import DataError
from eagleray.platform.runs import RunFolder

CONFIG = Path(__file__).parents[3] / "configs" / "rovrm" / "progressive_tiny.yaml"
PHASES = (
    "phases=[{phase: 1, data: {synthetic: [{kind: text, samples: 40}]}, select: {count: 12}},"
    "{phase: 2, data: {synthetic: [{kind: caption, samples: 40}]}, select: {fraction: 0.5}},"
    "{phase: 3, data: {synthetic: [{kind: visual, samples: 16}]}, train_vision_tower: true}]"
)
SMALL = "selection={warm_up: {samples: 8}, features: {rank: 2, width: 64}}"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[train.Config]:
    """Stands in for training and for Ray's workers; the configs of the phases in the order they are run."""
    runs: list[train.Config] = []

    def phase(cfg: train.Config) -> None:
        with RunFolder.create(train.JOB, cfg).recording() as run:
            runs.append(cfg)
            assert cfg.model is not None
            record = PhaseRecord(cfg.phase, weights_sha256(cfg.model.path), {}, [], len(runs))
            save_reward_model(*tiny_llava(seed=cfg.phase), run.model, lineage=[record])
            run.write_report({"samples": len(load_parts(cfg.data, seed=cfg.train.seed).train)})

    def stream(build: Any, arguments: Any, rows: Any, section: Any, **_: Any) -> Any:
        return enumerate(build(**arguments)(rows))

    monkeypatch.setattr(train, "main", phase)
    monkeypatch.setattr(progressive, "connected", nullcontext)
    monkeypatch.setattr(encoding, "stream_with_model", stream)
    return runs


def _chain(folder: Path, *overrides: str) -> dict[str, Any]:
    return progressive.main(_config(folder, PHASES, SMALL, *overrides))


def _config(folder: Path, *overrides: str) -> progressive.Config:
    return load_config(progressive.Config, CONFIG, [f"run.dir={folder}", *overrides])


def _ids(path: str | Path) -> list[str]:
    return [json.loads(line)["id"] for line in Path(path).read_text().splitlines()]


def test_phases_train_on_what_was_selected_for_the_phase_after_them(
    tmp_path: Path, trained: list[train.Config]
) -> None:
    report = _chain(tmp_path / "chain")
    warm_up, *phases = trained
    assert [cfg.phase for cfg in trained] == [3, 1, 2, 3]
    assert warm_up.data.limit_each == 8 and warm_up.train_vision_tower
    assert {made.kind for made in warm_up.data.synthetic} == {"text", "caption", "visual"}
    assert report["selection"]["2-phase-2"]["target"] == "target"
    assert report["selection"]["1-phase-1"]["target"] == "2-phase-2"  # chained
    assert report["selection"]["1-phase-1"]["targets"] == 20
    assert [phase["summary"]["samples"] for phase in report["phases"]] == [12, 20, 16]
    for cfg, count in zip(phases, (12, 20, None), strict=True):
        if count is None:
            assert cfg.data.only is None
        else:
            found = {s.record.id for s in load_parts(cfg.data, seed=cfg.train.seed).train}
            assert found == set(_ids(str(cfg.data.only))) and len(found) == count
    assert phases[0].model and phases[0].model.path == warm_up.model.path  # type: ignore[union-attr]

    # Cut short behind the first phase: what is there stays, and the rest is done again.
    manifest = tmp_path / "chain" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"status": "finished"', '"status": "interrupted"', 1))
    third = tmp_path / "chain" / "3-phase-3" / "manifest.json"
    third.write_text(third.read_text().replace('"status": "finished"', '"status": "interrupted"', 1))
    again = _chain(tmp_path / "chain")
    assert [cfg.phase for cfg in trained[4:]] == [3]
    assert again["selection"] == report["selection"]


def test_baselines_are_configurations(tmp_path: Path, trained: list[train.Config]) -> None:
    """Random selection of equal size needs no warm-up; unchained selection has the pictures as its target throughout."""
    report = _chain(tmp_path / "random", "selection.method=random")
    assert [cfg.phase for cfg in trained] == [1, 2, 3]
    assert [phase["summary"]["samples"] for phase in report["phases"]] == [12, 20, 16]
    first = {s.record.id for s in load_parts(trained[0].data, seed=trained[0].train.seed).train}
    trained.clear()
    report = _chain(tmp_path / "unchained", "selection.chained=false", "selection.method=cosine")
    assert report["selection"]["1-phase-1"]["target"] == "target"
    assert report["selection"]["1-phase-1"]["targets"] == 16
    assert first != set(_ids(str(trained[1].data.only)))


def test_what_a_phase_may_select() -> None:
    pair = "{phase: 1, data: {synthetic: [{kind: text}]}"
    for phases, message in (
        (f"[{pair}, select: {{count: 3}}}}]", "the last of the `phases` cannot `select`"),
        (f"[{pair}, select: {{}}}}, {pair}}}]", "give either `count` or `fraction`"),
        (f"[{pair}, select: {{fraction: 0}}}}, {pair}}}]", "greater than 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(progressive.Config, CONFIG, [f"phases={phases}"])


def test_data_of_a_selection_and_equal_mixtures(tmp_path: Path) -> None:
    text = {"kind": "text", "samples": 20}
    values = {"synthetic": [text, {"kind": "caption", "samples": 20}, {"kind": "visual", "samples": 20}]}
    mixed = load_parts(VisualData.model_validate(values | {"limit_each": 5}), seed=0).train
    kinds = [sample.source for sample in mixed]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "generated text": 5,
        "generated caption": 5,
        "generated visual": 5,
    }
    pool = load_parts(VisualData.model_validate({"synthetic": [text]}), seed=0).train
    taken = tmp_path / "taken.jsonl"
    taken.write_text("".join(json.dumps({"id": s.record.id}) + "\n" for s in pool[3:6]))
    data = {"synthetic": [text], "only": str(taken)}
    assert load_parts(VisualData.model_validate(data), seed=0).train == pool[3:6]
    taken.write_text('{"id": "elsewhere"}\n')
    with pytest.raises(DataError, match=r"1 of 1 selected samples are not in the data.*elsewhere"):
        load_parts(VisualData.model_validate(data), seed=0)
