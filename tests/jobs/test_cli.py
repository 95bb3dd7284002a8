"""The `eagleray` command and `python -m eagleray.jobs.<name>`: what they run, print and return."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import pytest

from eagleray.jobs import launch, registry
from eagleray.jobs.cli import main
from eagleray.jobs.launch import find_user_error, run_job
from eagleray.jobs.registry import JOBS, load_job
from eagleray.platform.config import Config, ConfigError
from eagleray.platform.runs import RunFolder, RunInterrupted
from eagleray.platform.sections import JobConfig, TrackingSection
from eagleray.platform.tracking import MetricsSink


class Source(Config):
    path: str
    """File to read."""
    limit: int | None = None
    """Rows to read."""


class ToyConfig(JobConfig):
    """Config of a job that does nothing but record itself."""

    job: Literal["toy.train"] = "toy.train"
    lr: float = 0.1
    """Peak learning rate [of the toy]."""
    sources: tuple[Source, ...] = ()
    """Where rows come from."""


class ToyJob:
    """The module of a job; `action` is what happens inside the recorded run."""

    def __init__(self) -> None:
        self.configs: list[ToyConfig] = []
        self.action: Any = lambda run: None

    def main(self, cfg: ToyConfig) -> None:
        self.configs.append(cfg)
        with RunFolder.create("toy.train", cfg).recording() as run:
            self.action(run)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ToyJob]:
    """A registered job, run in an empty folder that holds `toy.yaml`."""
    job = ToyJob()
    module = ModuleType("toy_job")
    vars(module).update(Config=ToyConfig, main=job.main)
    monkeypatch.setitem(sys.modules, "toy_job", module)
    monkeypatch.setitem(registry.JOBS, "toy.train", "toy_job")
    monkeypatch.setattr(launch, "configure_logging", lambda: None)  # logging set-up outlives a test
    monkeypatch.setattr("eagleray.jobs.cli.configure_logging", lambda: None)
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text("job: toy.train\nlr: 0.2\nsources: [{path: a.jsonl}]\n")
    yield job


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert isinstance(stop.value.code, int)
    return stop.value.code


def raising(error: BaseException) -> Any:
    def action(run: RunFolder) -> None:
        run.metrics.write_text("one step")
        raise error

    return action


def test_train_runs_the_job_that_the_file_names(toy: ToyJob) -> None:
    assert exit_code("train", "toy.yaml", "lr=0.3", "run.dir=out") == 0
    (cfg,) = toy.configs
    assert (cfg.lr, cfg.sources) == (0.3, (Source(path="a.jsonl"),))
    assert json.loads(Path("out/manifest.json").read_text())["status"] == "finished"


def test_python_m_does_the_same(toy: ToyJob) -> None:
    run_job("toy.train", ["--config", "toy.yaml", "lr=0.3", "run.dir=out"])
    run_job("toy.train", ["run.dir=other", "lr=0.4"])
    assert [cfg.lr for cfg in toy.configs] == [0.3, 0.4]


def test_python_m_refuses_the_file_of_another_job(toy: ToyJob, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.yaml").write_text("job: gram.finetune\n")
    with pytest.raises(SystemExit, match="2"):
        run_job("toy.train", ["--config", "other.yaml"])
    assert "`job`: Input should be 'toy.train' (given: 'gram.finetune')" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "job: toy.trian\n",
            "There is no job `toy.trian`. Did you mean `toy.train`? The jobs are: align.",
        ),
        ("lr: 0.2\n", "bad.yaml: the key `job` is missing; it says what to run"),
        ("job: toy.train\nlearning_rate: 1\n", "unknown key `learning_rate`"),
        ("job: [toy\n", "bad.yaml: cannot be read as YAML"),
    ],
)
def test_mistakes_are_one_message_and_code_2(
    toy: ToyJob, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    Path("bad.yaml").write_text(content)
    assert exit_code("train", "bad.yaml") == launch.USER_ERROR
    printed = capsys.readouterr().err
    assert printed.startswith("Error: ")
    assert message in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("stop", "code"),
    [(KeyboardInterrupt(), 130), (RunInterrupted("my run", signal.SIGTERM), 143)],
    ids=["ctrl-c", "sigterm"],
)
def test_a_stop_says_how_to_resume_and_that_works(
    toy: ToyJob, capsys: pytest.CaptureFixture[str], stop: BaseException, code: int
) -> None:
    toy.action = raising(stop)
    assert exit_code("train", "toy.yaml", "lr=0.3", "run.dir=my run") == code
    printed = capsys.readouterr().err
    assert "eagleray train 'my run/config.yaml' 'run.dir=my run'" in printed
    toy.action = lambda run: None
    assert exit_code("train", "my run/config.yaml", "run.dir=my run") == 0
    assert toy.configs[0] == toy.configs[1]


def test_ctrl_c_before_a_run_began(
    toy: ToyJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "load_config", stopped)
    assert exit_code("train", "toy.yaml") == 130
    assert capsys.readouterr().err == "Interrupted: no run had begun.\n"


def test_a_finished_run_is_no_error(toy: ToyJob, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("train", "toy.yaml", "run.dir=out") == 0
    assert exit_code("train", "toy.yaml", "run.dir=out") == 0
    assert "Nothing to do: " in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(toy: ToyJob) -> None:
    toy.action = raising(RuntimeError("boom"))
    with pytest.raises(RuntimeError, match="boom"):
        main(["train", "toy.yaml", "run.dir=out"])


def test_the_traceback_of_a_user_error_on_request(
    toy: ToyJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EAGLERAY_TRACEBACK", "1")
    toy.action = raising(ConfigError("[too] wide"))
    assert exit_code("train", "toy.yaml", "run.dir=out") == launch.USER_ERROR
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert printed.endswith("Error: [too] wide\n")


def test_what_counts_as_a_user_error() -> None:
    ours = ConfigError("x")
    assert find_user_error(ours) is ours
    assert find_user_error(RuntimeError("x")) is None
    assert find_user_error(ValueError("raised by nobody")) is None
    with pytest.raises(ValueError, match="Expecting") as foreign:
        json.loads("{")
    assert find_user_error(foreign.value) is None
    with pytest.raises(ValueError, match="Metrics may not be called") as raised_by_us:
        MetricsSink.log(SimpleNamespace(), 1, {"step": 1})  # pyright: ignore[reportArgumentType]
    assert find_user_error(raised_by_us.value) is raised_by_us.value


def test_user_errors_are_found_inside_rays_wrappers() -> None:
    from ray.exceptions import RayTaskError

    ours = ConfigError("x")
    from_task = RayTaskError("f", "Traceback ...", ours).as_instanceof_cause()
    assert find_user_error(from_task) is ours
    from_worker = type("WorkerGroupError", (RuntimeError,), {"worker_failures": {0: from_task}})()
    assert find_user_error(from_worker) is ours
    bug = RayTaskError("f", "Traceback ...", ValueError("x")).as_instanceof_cause()
    assert find_user_error(bug) is None


def test_config_show_tells_where_values_come_from(toy: ToyJob, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("config", "show", "toy.yaml", "lr=0.3", "run.note=x y") == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert rows["lr"].split()[1:3] == ["0.3", "override"]
    assert "Peak learning rate [of the toy]." in rows["lr"]
    assert rows["job"].split()[1:3] == ["toy.train", "file"]
    assert rows["sources.0.path"].split()[1:3] == ["a.jsonl", "file"]
    assert rows["sources.0.limit"].split()[1:3] == ["null", "default"]
    assert rows["run.note"].split()[1:4] == ["x", "y", "override"]
    assert rows["ray.num_workers"].split()[1:3] == ["1", "default"]


def test_config_schema_is_json(toy: ToyJob, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("config", "schema", "toy.train") == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"]["lr"]["description"] == "Peak learning rate [of the toy]."
    assert exit_code("config", "schema", "toy") == launch.USER_ERROR


def record_run(folder: str, lr: float, accuracy: float) -> None:
    def action(run: RunFolder) -> None:
        with MetricsSink(run.path, TrackingSection(tensorboard=False)) as sink:
            sink.log(1, {"loss": 1.0})
            sink.log(1, {"accuracy": accuracy}, kind="eval")
        run.update_manifest(data_hashes={"a.jsonl": "0123456789abcdef"})
        run.write_report({"accuracy": accuracy})

    job = ToyJob()
    job.action = action
    job.main(ToyConfig.model_validate({"lr": lr, "run": {"dir": folder, "note": f"lr {lr}"}}))


def test_runs_list(toy: ToyJob, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("runs", "list") == 0
    assert capsys.readouterr().out == "No runs in runs.\n"
    record_run("runs/a", 0.1, 0.5)
    assert exit_code("runs", "list") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "runs/a" in line]
    assert line.split()[1:3] == ["toy.train", "finished"]
    assert line.rstrip().endswith("lr 0.1")


def test_runs_show(toy: ToyJob, capsys: pytest.CaptureFixture[str]) -> None:
    record_run("runs/a", 0.1, 0.5)
    assert exit_code("runs", "show", "runs/a") == 0
    printed = capsys.readouterr().out
    for expected in ("finished", "toy.train", "a.jsonl (0123456789ab)", "accuracy"):
        assert expected in printed
    assert "Resume" not in printed


def test_runs_show_of_a_failed_run(toy: ToyJob, capsys: pytest.CaptureFixture[str]) -> None:
    toy.action = raising(ConfigError("no such file"))
    assert exit_code("train", "toy.yaml", "run.dir=runs/a") == launch.USER_ERROR
    assert exit_code("runs", "show", "runs/a") == 0
    printed = capsys.readouterr().out
    assert "ConfigError: no such file" in printed
    assert "Resume: eagleray train runs/a/config.yaml run.dir=runs/a" in printed


def test_runs_compare(toy: ToyJob, capsys: pytest.CaptureFixture[str]) -> None:
    record_run("runs/a", 0.1, 0.5)
    record_run("runs/b", 0.2, 0.625)
    assert exit_code("runs", "compare", "runs/a", "runs/b") == 0
    rows = {
        line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.strip()
    }
    assert rows["a"] == ["b"]
    assert rows["lr"] == ["0.1", "0.2"]
    assert rows["accuracy"] == ["0.5", "0.625"]
    assert "sources" not in rows


def test_runs_plot(toy: ToyJob, capsys: pytest.CaptureFixture[str]) -> None:
    record_run("runs/a", 0.1, 0.5)
    record_run("runs/b", 0.2, 0.625)
    assert exit_code("runs", "plot", "runs/a") == 0
    assert exit_code("runs", "plot", "runs/a", "runs/b", "--out", "both.png") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["runs/a/plots/loss.png", "runs/a/plots/eval_accuracy.png", "both.png"]
    assert all(Path(path).stat().st_size > 1000 for path in printed)


def test_no_run_folder(toy: ToyJob, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("runs", "show", ".") == launch.USER_ERROR
    assert ". is not a run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["runs", "list"], ["config", "schema", "none"], ["--version"]]
)
def test_starting_the_command_imports_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    code = f"""
import sys
from eagleray.jobs.cli import main
try:
    main({arguments!r})
finally:
    heavy = {{"torch", "ray", "transformers", "deepspeed", "matplotlib", "numpy"}} & set(sys.modules)
    print("heavy:", sorted(heavy), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=tmp_path, capture_output=True, text=True
    )
    assert "heavy: []" in done.stderr


@pytest.mark.parametrize("name", sorted(JOBS))
def test_every_job_has_a_config_of_its_name_and_a_main(name: str) -> None:
    job = load_job(name)
    assert job.Config.model_fields["job"].default == name
    assert job.Config.model_fields["job"].annotation == Literal[name]  # pyright: ignore[reportInvalidTypeForm]
    assert callable(job.main)


def test_runs_html_writes_the_page_and_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["runs", "html", str(tmp_path), "--out", str(tmp_path / "page.html")])
    assert not ended.value.code and capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert "0 run(s)" in (tmp_path / "page.html").read_text()
