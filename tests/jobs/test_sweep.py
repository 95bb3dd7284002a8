"""`eagleray sweep`: what is refused at once, and whole sweeps through Ray Tune over Ray Train."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune
from ray._common.utils import get_ray_address_file
from ray._private.state import actors

from eagleray.jobs import sweep
from eagleray.jobs.cli import main as eagleray
from eagleray.jobs.gram import finetune
from eagleray.jobs.registry import JOBS, job_name, load_job
from eagleray.jobs.sweep import SPACES, Config, load_space, parse_seeds, resumed_config, sweep_config
from eagleray.platform.cluster import PlacementError
from eagleray.platform.config import ConfigError, load_config
from eagleray.platform.runs import RunFolder
from eagleray.platform.sections import TrainingConfig
from eagleray.platform.space import Space
from eagleray.platform.tracking import read_metrics

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs/gram/finetune_tiny.yaml"
TARGETS = {
    "label_count": ["gram.finetune", "gram.discriminative"],
    "label_smoothing": ["gram.finetune"],
    "lisa_rank": ["lisa.train"],
    "margin_scale": ["gram.discriminative"],
    "nast": ["nast.train"],
}
"""The jobs that a space is for, by which its keys are checked; default: all training jobs."""
TRAINING = [
    name
    for name in JOBS
    if (ROOT / "configs" / f"{name.replace('.', '/')}_tiny.yaml").exists()
    and issubclass(load_job(name).Config, TrainingConfig)
]


def config(*overrides: str, space: str = "label_smoothing", **options: Any) -> Config:
    return sweep_config(space, TINY, overrides, **options)


@pytest.mark.parametrize(("name", "target"), [(s, job) for s in SPACES for job in TARGETS.get(s, TRAINING)])
@pytest.mark.parametrize("search", ["grid", "random", "optuna"])
def test_every_space_fits_the_configs_that_it_targets(
    name: str, target: str, search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a model that the examples left behind would bear fewer points
    job = load_job(target)
    tiny = load_config(job.Config, ROOT / "configs" / f"{target.replace('.', '/')}_tiny.yaml")
    space = load_space(name, search, job)
    sweep.check_space(space, job.Config, tiny.model_dump(mode="json"), search=search)  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("target", "metric", "mode"),
    [("gram.finetune", "accuracy", "max"), ("backbone.pretrain", "loss", "min")],
)
def test_a_space_without_a_metric_takes_the_one_of_the_job(target: str, metric: str, mode: str) -> None:
    space = load_space("optim", "grid", load_job(target))
    assert (space.metric, space.mode) == (metric, mode)


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
        ({"seeds": []}, "`seeds.*at least 1 item"),
        ({"seeds": [0, 1], "search": "optuna"}, "optuna looks at single runs"),
        ({"seeds": 0}, "`seeds.*greater than 0"),
        ({"seeds": 2, "search": "optuna"}, "optuna looks at single runs"),
        ({"seeds": [0, 1], "scheduler": "asha"}, "a mean over seeds needs whole runs"),
        ({"scheduler": "pbt", "search": "optuna"}, "pbt finds its points itself"),
        ({"perturb_every": 4}, "`perturb_every` is for `scheduler` pbt only"),
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
    assert parse_seeds("3") == 3
    with pytest.raises(ConfigError, match=r"`--seeds` is '1;2'"):
        parse_seeds("1;2")


def test_a_number_of_seeds_counts_from_that_of_the_config() -> None:
    assert sweep._plan(config("train.seed=5", seeds=3)).seeds == (5, 6, 7)
    assert sweep._plan(config("train.seed=5", seeds=[2])).seeds == (2,)
    assert sweep._plan(config("train.seed=5")).seeds == (5,)


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
    assert "`train.metric` is 'nll', but the sweep selects by 'accuracy'" in message


def test_trials_keep_the_model_by_the_first_objective(tmp_path: Path) -> None:
    plan = sweep._plan(config(objectives=["consistency:max", "nll:min"]))
    assert plan.train.metric == "consistency"
    assert [o.metric for o in plan.space.objectives] == ["consistency", "nll"]
    assert sweep._plan(config()).train.metric is None
    message = refused(config(objectives=["nll:min"]), tmp_path)
    assert "selects by nll:min" in message and "Set `train.keep_model=last`" in message
    assert sweep._plan(config("train.keep_model=last", objectives=["nll:min"])).train.metric is None


def test_trials_that_share_recorded_files_need_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EAGLERAY_WORK_DIR", str(tmp_path / "work"))
    cfg = sweep_config("optim", ROOT / "configs/lisa/train_tiny.yaml", [f"run.dir=file://{tmp_path}/run"])
    with pytest.raises(ConfigError, match="written by several processes, which need a path"):
        sweep.main(cfg)
    assert not (tmp_path / "run").exists()


def test_a_population_needs_a_known_end(tmp_path: Path) -> None:
    options: dict[str, Any] = {"scheduler": "pbt", "num_samples": 4}
    assert "needs `train.max_steps`" in refused(config("train.max_steps=null", **options), tmp_path)
    assert "nobody would ever take over" in refused(config(perturb_every=20, **options), tmp_path)


def test_asha_needs_evaluations(tmp_path: Path) -> None:
    message = refused(config("train.max_steps=4", "train.eval_every=4", scheduler="asha"), tmp_path)
    assert "compares trials at their evaluations" in message


def test_ctrl_c_in_the_command_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("eagleray.jobs.cli.configure_logging", lambda: None)  # would outlive the test
    monkeypatch.setattr(sweep, "_sweep", interrupt)
    with pytest.raises(SystemExit) as stop:
        eagleray(["sweep", "label_smoothing", "--config", str(TINY), f"run.dir={tmp_path / 'run'}"])
    assert stop.value.code == 130
    assert "resume the run with" in capsys.readouterr().err
    assert RunFolder(tmp_path / "run").read_manifest()["status"] == "interrupted"
    assert resumed_config(str(tmp_path / "run")) == config(f"run.dir={tmp_path / 'run'}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "nowhere"], "nowhere holds no sweep"),
        (["--resume", "nowhere", "label_smoothing"], "give nothing else with it"),
        (["label_smoothing"], "needs a SPACE and `--config`"),
    ],
)
def test_what_the_command_needs(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("eagleray.jobs.cli.configure_logging", lambda: None)  # would outlive the test
    with pytest.raises(SystemExit) as stop:
        eagleray(["sweep", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_trials_of_a_sweep_with_another_config_are_not_mixed_in(tmp_path: Path) -> None:
    run = RunFolder.create("sweep", config(f"run.dir={tmp_path / 'run'}"))
    run.close()
    (run.path / "trials" / "0001").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"another config:\n  - trial.optim.lr: 0.001 -> 0.5"):
        sweep.main(config(f"run.dir={tmp_path / 'run'}", "optim.lr=0.5"))


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
    return {a["ActorClassName"] for a in actors().values() if a["State"] != "DEAD"}


_OTHER_CLUSTER = """
import sys, ray
ray.init(address="local", num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False, _temp_dir=sys.argv[1])
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_cluster() -> Iterator[None]:
    """A second cluster on this machine, the one that the default address file names."""
    file = Path(get_ray_address_file(None))
    before = file.read_text() if file.exists() else None
    with tempfile.TemporaryDirectory(prefix="er-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", _OTHER_CLUSTER, folder], **pipes)
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            assert address and address != ray.get_runtime_context().gcs_address
            file.parent.mkdir(exist_ok=True)
            file.write_text(address)
            yield
        finally:
            file.unlink(missing_ok=True)
            if before is not None:
                file.write_text(before)
            process.communicate()  # closes its input, by which it ends


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "other_cluster")
def test_asha_stops_bad_trials_and_they_give_everything_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Selects the run that diverges, because that is sure to stand out after four steps; the other stands still.

    One at a time, so that the other is compared with it.
    """
    rates = Space("rates", {"optim.lr": tune.grid_search([1.0, 1e-9])}, "nll", "max", ("nll",))
    monkeypatch.setattr(sweep, "load_space", lambda *_: rates)
    caplog.set_level(logging.INFO, logger="eagleray")
    baseline, actors_before = resources(), living_actors()
    steps = ["train.max_steps=20", "train.eval_every=4"]
    cfg = config(*QUICK, *steps, f"run.dir={tmp_path / 'run'}", scheduler="asha", max_concurrent=1)

    done = sweep.main(cfg)

    assert returns_to(baseline, within_s=10)
    assert living_actors() <= actors_before | {
        "_AutoscalingCoordinatorActor"
    }  # one for the cluster, holds nothing
    report = json.loads((done.path / "report.json").read_text())
    assert report["count"] == {"finished": 1, "stopped": 1, "failed": 0}
    assert report["best"]["optim.lr"] == 1.0
    ends = [(row["trials"], row["status"], row["step"] < 20) for row in report["table"]]
    assert ends == [("0001", "finished", False), ("0002", "stopped", True)]
    manifest = RunFolder(done.path / "trials" / "0002").read_manifest()
    assert (manifest["status"], manifest["attempts"][0]["status"]) == ("stopped", "stopped")
    assert "2 trial(s), 1 at a time; the cluster holds 4 of 1 worker(s) x 1 CPU each" in caplog.text
    pictures = {"by_optim.lr.png", "nll_over_time.png", "parallel.png"}
    assert {path.name for path in (done.path / "plots").iterdir()} == pictures


def files(folder: Path) -> dict[str, int]:
    """Everything below a folder, with the time of its last change."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_command_with_optuna_is_resumed_and_ends_in_a_config_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The driver is killed in the second of two trials; the first is not touched again, the second goes on.

    The sweep lies at a URI: what the driver reads of its trials, it reads there.
    """
    monkeypatch.setattr("eagleray.jobs.cli.configure_logging", lambda: None)  # would outlive the test
    monkeypatch.chdir(tmp_path)
    baseline, trials, place = resources(), tmp_path / "here/trials", f"file://{tmp_path}/here"
    options = ["--search", "optuna", "--num-samples", "2", "--max-concurrent", "1"]
    options += ["--objective", "accuracy:max", "--objective", "nll:min"]
    steps = ["train.max_steps=24", "train.eval_every=4", "train.seed=7", f"run.dir={place}"]
    steps += [f"ray.address={ray.get_runtime_context().gcs_address}"]
    command = ["sweep", "label_smoothing", "--config", str(TINY), *QUICK, *steps, *options]

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with Path("log").open("w") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "eagleray.jobs.cli", *command], env=environment, stdout=log, stderr=log
        )
    while not (trials / "0002/checkpoints/step-00000004/checkpoint.json").exists():
        assert driver.poll() is None, Path("log").read_text()
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    killed = time.time()
    assert RunFolder(trials / "0002").read_manifest()["status"] == "running"
    drivers_of_trials = set(re.findall(r"\(trial pid=(\d+)", Path("log").read_text()))
    assert len(drivers_of_trials) == 1  # it has imported everything once
    assert returns_to(baseline, within_s=10)
    first = files(trials / "0001")

    with pytest.raises(SystemExit) as stop:
        eagleray(["sweep", "--resume", place])

    assert stop.value.code == 0
    assert returns_to(baseline, within_s=10)
    assert files(trials / "0001") == first
    second = RunFolder(trials / "0002").read_manifest()
    assert [attempt["status"] for attempt in second["attempts"]] == ["killed", "finished"]
    records = read_metrics(trials / "0002/metrics.jsonl")
    assert records[0]["time"] < killed < records[-1]["time"]
    assert [record["step"] for record in records if record["kind"] == "eval"] == list(range(4, 25, 4))
    assert len(RunFolder("here").read_manifest()["attempts"]) == 2

    report = json.loads(Path("here/report.json").read_text())
    assert report["count"] == {"finished": 2, "stopped": 0, "failed": 0}
    values = [row["loss.smoothing"] for row in report["table"]]
    assert len(set(values)) == 2 and all(0 <= value <= 0.3 for value in values)
    accuracies = [row["accuracy"] for row in report["table"]]
    assert accuracies == sorted(accuracies, reverse=True)
    assert report["pareto"][0]["accuracy"] == accuracies[0]
    assert Path("here/pareto.md").exists() and Path("here/plots/pareto.png").exists()
    printed = capsys.readouterr().out
    assert Path("here/table.md").read_text() in printed and "eagleray train" in printed

    best = load_config(load_job(job_name("here/best.yaml")).Config, "here/best.yaml")
    assert isinstance(best, finetune.Config)
    assert (best.loss.smoothing, best.loss.convention, best.train.seed) == (values[0], "torch", 7)
    assert best.run.dir is None
    assert RunFolder("here").read_manifest()["seeds"]["sweep"] == [7]
    manifests = [RunFolder(path).read_manifest() for path in sorted(trials.iterdir())]
    assert [manifest["seeds"]["train.seed"] for manifest in manifests] == [7, 7]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("scheme", ["", pytest.param("file://", marks=pytest.mark.soak)])
def test_a_population_exploits(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two trials one takes over from the other, which goes on undisturbed.

    Both then compute the same loss on the same batch, bit for bit, as the weights are the same; the rates differ by
    the factor that was recorded, and so do the weights from there on.
    """
    domains = {"optim.lr": tune.loguniform(1e-4, 1e-2)}
    monkeypatch.setattr(sweep, "load_space", lambda *_: Space("rates", domains, "nll", "max"))
    caplog.set_level(logging.INFO, logger="eagleray")
    baseline = resources()
    steps = ["train.max_steps=8", "train.eval_every=4", "train.log_every=1"]
    folder, place = tmp_path / "run", f"{scheme}{tmp_path / 'run'}"
    cfg = config(*QUICK, *steps, f"run.dir={place}", scheduler="pbt", num_samples=2, perturb_every=4)

    done = sweep.main(cfg)

    assert returns_to(baseline, within_s=10)
    report = json.loads((folder / "report.json").read_text())
    assert report["count"] == {"finished": 2, "stopped": 0, "failed": 0}
    (exploit,) = report["exploits"]
    clone, donor = (folder / "trials" / exploit[key] for key in ("trial", "donor"))
    assert clone != donor and exploit["step"] == 4
    ends = [read_metrics(path / "segment-01/metrics.jsonl")[-1]["nll"] for path in (clone, donor)]
    assert ends[0] < ends[1]  # the space selects by the largest
    start = load_config(finetune.Config, clone / "segment-02/config.yaml").train.start_from
    assert start == f"{scheme}{donor}/segment-01/checkpoints/step-00000004"
    taken, examples = (path / "data" for path in (clone / "segment-02", donor / "segment-01"))
    assert scheme or taken.resolve() == examples.resolve()
    assert (taken / "train.arrow").read_bytes() == (examples / "train.arrow").read_bytes()

    rates = [
        load_config(finetune.Config, path / "segment-01/config.yaml").optim.lr for path in (clone, donor)
    ]
    new = load_config(finetune.Config, clone / "segment-02/config.yaml").optim.lr
    assert (exploit["old"]["optim.lr"], exploit["new"]["optim.lr"]) == (rates[0], new)
    mine, theirs = (read_metrics(path / "segment-02/metrics.jsonl") for path in (clone, donor))
    assert [record["step"] for record in mine] == [5, 6, 7, 8, 8]
    assert mine[0]["loss"] == theirs[0]["loss"]
    assert mine[0]["lr"] / theirs[0]["lr"] == pytest.approx(new / rates[1]) != 1
    assert mine[1]["loss"] != theirs[1]["loss"]

    told = f"{clone.name} goes on from {donor.name} with optim.lr {rates[0]:.6g} -> {new:.6g}"
    assert told in caplog.text
    assert f"| 4    | {clone.name}  | {donor.name} |" in (folder / "exploits.md").read_text()
    assert load_config(finetune.Config, done.best).optim.lr == report["best"]["optim.lr"]

    # As if the driver had been killed before the clone's last segment: that alone is trained, with what was decided.
    shutil.rmtree(clone / "segment-02")
    (folder / "report.json").unlink()
    RunFolder(folder).update_manifest(status="running")
    others = {path: files(path) for path in (donor / "segment-02", clone / "segment-01")}
    resumed = sweep.main(resumed_config(place))
    assert {path: files(path) for path in others} == others
    assert resumed.table == done.table
    assert json.loads((folder / "report.json").read_text()) == report


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_what_can_never_be_placed_is_refused(tmp_path: Path) -> None:
    cfg = config(
        "ray.num_workers=8", "train={batch_size: 8, micro_batch_size: 1}", f"run.dir={tmp_path / 'run'}"
    )
    with pytest.raises(PlacementError, match=r"needs 8 worker\(s\) x 1 CPU"):
        sweep.main(cfg)
