"""`eagleray sweep`: what is refused at once, and whole sweeps through Ray Tune over Ray Train."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune

from eagleray.jobs import sweep
from eagleray.jobs.cli import main as eagleray
from eagleray.jobs.gram import finetune
from eagleray.jobs.registry import job_name, load_job
from eagleray.jobs.sweep import SPACES, Config, load_space, parse_seeds, sweep_config
from eagleray.platform.cluster import PlacementError
from eagleray.platform.config import ConfigError, load_config
from eagleray.platform.runs import RunFolder, RunInterrupted
from eagleray.platform.tuning import Space

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs/gram/finetune_tiny.yaml"
TARGETS = {"label_smoothing": "gram.finetune", "nast": "nast.train"}
"""A job for each space, by which its keys are checked."""


def config(*overrides: str, space: str = "label_smoothing", **options: Any) -> Config:
    return sweep_config(space, TINY, overrides, **options)


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("search", ["grid", "random", "optuna"])
def test_every_space_fits_the_config_that_it_targets(name: str, search: Any) -> None:
    job = load_job(TARGETS[name])
    tiny = load_config(job.Config, ROOT / "configs" / (TARGETS[name].replace(".", "/") + "_tiny.yaml"))
    sweep.check_space(load_space(name, search), job.Config, tiny.model_dump(mode="json"), search=search)  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "grid"),
        ({"num_samples": 8}, "random"),
        ({"num_samples": 8, "search": "optuna"}, "optuna"),
        ({"search": "random"}, "random"),
    ],
)
def test_default_search(options: dict[str, Any], expected: str) -> None:
    assert config(**options).chosen_search == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": "grid", "num_samples": 3}, "`num_samples` has no meaning for a grid"),
        ({"seeds": [1, 1]}, "same seed twice"),
        ({"seeds": []}, "`seeds`"),
        ({"seeds": [0, 1], "search": "optuna"}, "optuna looks at single runs"),
        ({"seeds": [0, 1], "scheduler": "asha"}, "a mean over seeds needs whole runs"),
        ({"search": "bayes"}, "`search`.*'grid', 'random' or 'optuna'"),
    ],
)
def test_options_that_do_not_fit_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**options)


def test_run_and_ray_belong_to_the_sweep() -> None:
    cfg = config("run.root=elsewhere", "ray.num_workers=2", "train.seed=3")
    assert (cfg.run.root, cfg.ray.num_workers) == ("elsewhere", 2)
    assert cfg.trial["train"]["seed"] == 3
    assert "run" not in cfg.trial and "ray" not in cfg.trial


@pytest.mark.parametrize("key", ["loss.smoothing=0.1", "loss.convention=paper"])
def test_a_key_of_the_space_cannot_be_set(key: str) -> None:
    with pytest.raises(ConfigError, match="is set by the space `label_smoothing`"):
        config(key)


def test_an_unknown_space() -> None:
    with pytest.raises(ConfigError, match=r"no space `label_smothing`. Did you mean `label_smoothing`"):
        config(space="label_smothing")


def test_seeds_of_the_command_line() -> None:
    assert parse_seeds("0,1, 2") == [0, 1, 2]
    assert parse_seeds(None) is None
    with pytest.raises(ConfigError, match=r"`--seeds` is '1;2'"):
        parse_seeds("1;2")


def refused(cfg: Config, tmp_path: Path) -> str:
    """The message by which a sweep is refused before it leaves a trace."""
    with pytest.raises(ConfigError) as error:
        sweep.main(cfg.model_copy(update={"run": cfg.run.model_copy(update={"dir": str(tmp_path / "run")})}))
    assert not (tmp_path / "run").exists()
    return str(error.value)


def test_only_training_jobs_are_swept(tmp_path: Path) -> None:
    assert "does not train" in refused(Config(space="label_smoothing", trial={"job": "sweep"}), tmp_path)
    assert "`trial.job` is missing" in refused(Config(space="label_smoothing", trial={}), tmp_path)


def test_a_space_for_another_job(tmp_path: Path) -> None:
    path = ROOT / "configs/backbone/pretrain_tiny.yaml"
    message = refused(sweep_config("label_smoothing", path, []), tmp_path)
    assert "space `label_smoothing`" in message and "unknown key `loss`" in message


def test_the_sweep_and_its_trials_select_alike(tmp_path: Path) -> None:
    message = refused(config("train.metric=nll"), tmp_path)
    assert "`train.metric` is 'nll', but the space `label_smoothing` selects by 'accuracy'" in message


def test_asha_needs_evaluations(tmp_path: Path) -> None:
    message = refused(config("train.max_steps=4", "train.eval_every=4", scheduler="asha"), tmp_path)
    assert "compares trials at their evaluations" in message


def test_an_interrupted_sweep_does_not_promise_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "_sweep", interrupt)
    cfg = config(f"run.dir={tmp_path / 'run'}")
    with pytest.raises(KeyboardInterrupt, match="cannot be resumed") as stop:
        sweep.main(cfg)
    assert not isinstance(stop.value, RunInterrupted)
    assert RunFolder(tmp_path / "run").read_manifest()["status"] == "interrupted"


def test_ctrl_c_in_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("eagleray.jobs.cli.configure_logging", lambda: None)  # would outlive the test
    monkeypatch.setattr(sweep, "_sweep", interrupt)
    with pytest.raises(SystemExit) as stop:
        eagleray(["sweep", "label_smoothing", "--config", str(TINY), f"run.dir={tmp_path / 'run'}"])
    assert stop.value.code == 130
    assert "a sweep cannot be resumed" in capsys.readouterr().err


def test_trials_of_an_earlier_attempt_are_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / "run" / "data").mkdir(parents=True)
    cfg = config(f"run.dir={tmp_path / 'run'}")
    run = RunFolder.create("sweep", cfg)
    run.close()
    (run.path / "trials").mkdir()
    with pytest.raises(ConfigError, match="holds the trials of an earlier attempt"):
        sweep.main(cfg)


QUICK = ["data.synthetic.pairs=60", "scratch={vocab_size: 400, width: 32, layers: 1, heads: 2}"]
QUICK += ["train={batch_size: 8, micro_batch_size: 8, log_every: 4}", "tracking.tensorboard=false"]


def resources() -> dict[str, float]:
    """Everything that placement groups can hold; a name is missing while nothing of it is free."""
    free = ray.available_resources()
    return {name: amount for name, amount in free.items() if not name.startswith("object_store")}


def returns_to(baseline: dict[str, float], *, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while resources() != baseline and time.monotonic() < deadline:
        time.sleep(0.1)
    return resources() == baseline


def living_actors() -> set[str]:
    return {a["ActorClassName"] for a in ray._private.state.actors().values() if a["State"] != "DEAD"}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_asha_stops_bad_trials_and_they_give_everything_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Selects the run that diverges, because that is sure to stand out after four steps; the others stand still.

    One at a time, so that the others are compared with it.
    """
    rates = Space("rates", {"optim.lr": tune.grid_search([1.0, 1e-9, 2e-9])}, "nll", "max", ("nll",))
    monkeypatch.setattr(sweep, "load_space", lambda *_: rates)
    caplog.set_level(logging.INFO, logger="eagleray")
    baseline, actors = resources(), living_actors()
    steps = ["train.max_steps=20", "train.eval_every=4"]
    cfg = config(*QUICK, *steps, f"run.dir={tmp_path / 'run'}", scheduler="asha", max_concurrent=1)

    done = sweep.main(cfg)

    assert returns_to(baseline, within_s=10)
    assert living_actors() <= actors | {"_AutoscalingCoordinatorActor"}  # one for the cluster, holds nothing
    report = json.loads((done.path / "report.json").read_text())
    assert report["count"] == {"finished": 1, "stopped": 2, "failed": 0}
    assert report["best"]["optim.lr"] == 1.0
    ends = [(row["trials"], row["status"], row["step"] < 20) for row in report["table"]]
    assert ends[0] == ("0001", "finished", False)
    assert sorted(ends[1:]) == [("0002", "stopped", True), ("0003", "stopped", True)]
    for name in ("0002", "0003"):
        manifest = RunFolder(done.path / "trials" / name).read_manifest()
        assert (manifest["status"], manifest["attempts"][0]["status"]) == ("stopped", "stopped")
    assert "3 trial(s), 1 at a time; the cluster holds 4" in caplog.text
    assert {path.name for path in (done.path / "plots").iterdir()} == {"by_optim.lr.png", "nll_over_time.png"}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_command_with_optuna_ends_in_a_config_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("eagleray.jobs.cli.configure_logging", lambda: None)  # would outlive the test
    monkeypatch.chdir(tmp_path)
    baseline = resources()
    options = ["--search", "optuna", "--num-samples", "2", "--seeds", "7"]
    steps = ["train.max_steps=4", "train.eval_every=4", "run.dir=here"]

    with pytest.raises(SystemExit) as stop:
        eagleray(["sweep", "label_smoothing", "--config", str(TINY), *QUICK, *steps, *options])

    assert stop.value.code == 0
    assert returns_to(baseline, within_s=10)
    report = json.loads(Path("here/report.json").read_text())
    assert report["count"] == {"finished": 2, "stopped": 0, "failed": 0}
    values = [row["loss.smoothing"] for row in report["table"]]
    assert len(set(values)) == 2 and all(0 <= value <= 0.3 for value in values)
    accuracies = [row["accuracy"] for row in report["table"]]
    assert accuracies == sorted(accuracies, reverse=True)
    printed = capsys.readouterr().out
    assert Path("here/table.md").read_text() in printed and "eagleray train" in printed

    best = load_config(load_job(job_name("here/best.yaml")).Config, "here/best.yaml")
    assert isinstance(best, finetune.Config)
    assert (best.loss.smoothing, best.loss.convention, best.train.seed) == (values[0], "torch", 7)
    assert best.run.dir is None
    assert RunFolder("here").read_manifest()["seeds"]["sweep"] == [7]
    trials = [RunFolder(path).read_manifest() for path in sorted(Path("here/trials").iterdir())]
    assert [trial["seeds"]["train.seed"] for trial in trials] == [7, 7]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_what_can_never_be_placed_is_refused(tmp_path: Path) -> None:
    cfg = config(
        "ray.num_workers=8", "train={batch_size: 8, micro_batch_size: 1}", f"run.dir={tmp_path / 'run'}"
    )
    with pytest.raises(PlacementError, match=r"needs 8 worker\(s\) x 1 CPU"):
        sweep.main(cfg)
