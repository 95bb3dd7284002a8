"""`eagleray experiment run`: from a file to a report, with a job that needs neither Ray nor a model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from eagleray.jobs import experiment
from eagleray.jobs.cli import main
from eagleray.platform.config import ConfigError, load_config, validate_config

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted((ROOT / "configs" / "experiments").glob("*.yaml"))


def _values(**fields: Any) -> dict[str, Any]:
    make = {"set": {"job": "gram.generate", "pairs": 12, "held_out": 10, "characters": 1000}, "minutes": 2}
    target = {"sources": [{"path": "${data}/test.jsonl"}]}
    pool = {"sources": [{"path": "${data}/train.jsonl"}]}
    choose = {"job": "select", "method": "longest", "target": {"pairs": target}, "overlap": "allow"}
    choose |= {"pools": {"pairs": {"pairs": pool, "count": 3}}}
    values = {"name": "toy", "title": "A toy", "size": "No model.", "data": "generated."}
    values["stages"] = {"data": make, "choose": {"set": choose}}
    result = {"label": "training pairs", "stage": "data", "metric": "train.jsonl", "unit": "pairs"}
    return {**values, "results": [result], **fields}


def _write(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"job": "experiment", **values}))
    return path


def _run(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["experiment", "run", *map(str, arguments)])
    return int(ended.value.code or 0)


@pytest.mark.ray  # for its processes: each stage is one
def test_from_a_file_to_a_report_and_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A stage fails, is mended and goes on; then nothing is left to do, and no job is imported."""
    monkeypatch.chdir(tmp_path)
    broken = _values()
    broken["stages"]["choose"]["set"]["target"]["pairs"]["sources"] = [{"path": "${data}/tset.jsonl"}]
    assert _run(_write(tmp_path / "broken.yaml", broken)) == 2
    messages = capsys.readouterr().err
    assert "1 of 2 stages failed" in messages and "same command again" in messages
    assert "tset.jsonl is not there" in messages and "test.jsonl, train.jsonl" in messages
    values = _values()
    values["stages"]["choose"]["minutes"] = 3
    path = _write(tmp_path / "toy.yaml", values)
    assert _run(path, "--dry-run") == 0
    assert "About 3 min 00 s" in capsys.readouterr().out, "what it needs is done"
    assert _run(path) == 0
    table = capsys.readouterr().out
    assert "| training pairs (pairs) | 12 |" in table
    folder = tmp_path / "runs" / "experiments" / "toy"
    report = json.loads((folder / "report.json").read_text())
    assert [stage["status"] for stage in report["stages"].values()] == ["finished", "finished"]
    assert (Path(report["stages"]["choose"]["run"]) / "selected" / "pairs.jsonl").is_file()
    assert len(list((folder / "stages").glob("data-*"))) == 1, "the data was not made twice"

    monkeypatch.setattr(experiment, "load_job", lambda name: pytest.fail(f"{name} was imported"))
    caplog.clear()
    assert _run(folder / "config.yaml") == 0
    assert "all 2 stages are done" in caplog.text and capsys.readouterr().out == table


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.parametrize(
    "path", [path for path in EXPERIMENTS if path.stem.endswith("_tiny")], ids=lambda path: path.stem
)
def test_tiny_experiments_end_in_a_whole_table(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every line has a number, and given again there is nothing to do."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    assert _run(path) == 0
    report = json.loads((tmp_path / "runs" / "experiments" / path.stem / "report.json").read_text())
    assert {stage["status"] for stage in report["stages"].values()} == {"finished"}
    assert report["results"] and all(math.isfinite(row["value"]) for row in report["results"])
    caplog.clear()
    assert _run(path) == 0
    assert f"all {len(report['stages'])} stages are done" in caplog.text


def test_dry_run_tells_the_graph_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run(_write(tmp_path / "toy.yaml", _values()), "cores=3", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "2 stages, 2 to run, with 3 core(s) for all of them" in shown
    assert "About 2 min 00 s" in shown and "1 stage(s) of unknown length" in shown
    assert not (tmp_path / "runs" / "experiments" / "toy" / "stages").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": {"a": {"set": {"pairs": 3}}}}, "`stages.a` names no job"),
        ({"stages": {"a": {"set": {"job": "gram.finetun"}}}}, "Did you mean `gram.finetune`"),
        (
            {"results": [{"label": "x", "stage": "evaluate", "metric": "m"}]},
            "a stage `evaluate`, which there is not",
        ),
    ],
)
def test_mistakes_in_the_file_are_told_at_once(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    cfg = validate_config(
        experiment.Config, _values(**{"results": [], **change}, run={"root": str(tmp_path)}), "test"
    )
    with pytest.raises(ConfigError, match=message):
        experiment.plan(cfg)


def test_a_stage_name_must_be_a_file_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`a/b` cannot name a stage"):
        validate_config(experiment.Config, _values(stages={"a/b": {}}), "test")
    with pytest.raises(ConfigError, match="`a/b` cannot stand in `each`"):
        validate_config(experiment.Config, _values(stages={"a": {"each": {"path": ["a/b"]}}}), "test")


def test_a_repeated_stage_makes_lines_and_means(tmp_path: Path) -> None:
    """Two sizes, two seeds: a line a size, each the mean of the two stages; labels that would be equal are refused."""
    values = _values(run={"root": str(tmp_path)})
    data = values["stages"]["data"]
    data["each"] = {"pairs": [12, 14], "seed": [0, 1]}
    data["set"] |= {"pairs": "${pairs}", "seed": "${seed}"}
    values["stages"]["choose"]["each"] = data["each"]
    line = {**values["results"][0], "label": "of ${pairs}", "mean_over": ["seed"]}
    cfg = validate_config(experiment.Config, {**values, "results": [line]}, "test")
    stages = {stage.name: stage for stage in experiment.plan(cfg)}
    assert len(stages) == 8 and stages["data-14-1"].values["pairs"] == 14
    assert set(experiment._needs(cfg, list(stages.values()))[0]) == set(stages)
    assert [(line.label, line.stages) for line in experiment._wanted(cfg)] == [
        ("of 12", ["data-12-0", "data-12-1"]),
        ("of 14", ["data-14-0", "data-14-1"]),
    ]
    cfg = validate_config(experiment.Config, {**values, "results": [{**line, "mean_over": []}]}, "test")
    with pytest.raises(ConfigError, match=r"two lines `of 12`.*repeated over pairs, seed"):
        experiment.plan(cfg)


def test_configs_of_all_stages_are_checked_before_the_first_starts(tmp_path: Path) -> None:
    values = _values(run={"root": str(tmp_path)})
    values["stages"]["choose"]["set"]["metod"] = "cosine"
    with pytest.raises(ConfigError, match=r"`stages.choose` \(set\): 1 problem.*\n.*mean `method`"):
        experiment.main(validate_config(experiment.Config, values, "test"))
    values["stages"]["choose"]["set"].pop("metod")
    values["stages"]["choose"]["set"]["ray"] = {"num_workers": 2, "use_gpu": False}
    with pytest.raises(ConfigError, match=r"needs 2 core\(s\); there are 1 core\(s\)"):
        experiment.main(validate_config(experiment.Config, {**values, "cores": 1}, "test"))
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_shipped_experiments_fit_together(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """References and results name stages that there are, and each stage's config is valid."""
    monkeypatch.chdir(ROOT)
    cfg = load_config(experiment.Config, path, [f"run.root={tmp_path}", "cores=1000"])
    monkeypatch.setattr(experiment, "_local_gpus", lambda: 1000)
    stages = experiment.plan(cfg)
    needs, _ = experiment._needs(cfg, stages)
    assert set(needs) == set(cfg.repetitions) and cfg.name == path.stem
