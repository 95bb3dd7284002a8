"""Jobs on a real cluster with token authentication: `eagleray submit` from a foreign folder, and plain `ray job submit`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from eagleray.jobs.cli import main
from eagleray.jobs.submit import _places, prepare, render
from eagleray.platform.config import ConfigError
from eagleray.platform.local_cluster import LocalCluster, local_cluster
from eagleray.platform.submission import STOPPED, SubmissionError, connect

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "gram" / "finetune_tiny.yaml"
SMALL = {"batch_size": 4, "micro_batch_size": 4, "max_steps": 2, "eval_every": 2, "log_every": 1}
PAIR = {"prompt": "Name a river in Peru.", "chosen": "The Ucayali.", "rejected": "Probably the Nile."}


@dataclass(frozen=True)
class Site:
    """A cluster with a home folder and a token of its own."""

    cluster: LocalCluster
    home: Path
    token: Path

    def run(self, *command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(self.token), **variables}
        return subprocess.run(
            [sys.executable, "-m", *command],
            check=False,
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,  # on a busy machine, workers alone may take minutes to start
        )

    def submit(
        self, *arguments: object, cwd: Path, code: Path = ROOT, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        command = ["eagleray.jobs.cli", "submit", "--address", self.cluster.dashboard, *map(str, arguments)]
        return self.run(*command, cwd=cwd, PYTHONPATH=str(code), **variables)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    home = tmp_path_factory.mktemp("home")
    (home / ".cache").symlink_to(Path.home() / ".cache")  # where DeepSpeed keeps what it compiled
    token = home / "token"
    token.write_text("0f" * 32)
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "HOME": str(home)}
    # The job must find our code in what was sent, not in what happens to be on the path here.
    with local_cluster(cpus_per_node=2, environment={**variables, "PYTHONPATH": ""}) as cluster:
        yield Site(cluster, home, token)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a config and its data, outside of the repository."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({**PAIR, "id": i}) + "\n" for i in range(8)))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values()))
    return tmp_path


def values(**sections: Any) -> dict[str, Any]:
    return {
        "job": "gram.finetune",
        "scratch": {"vocab_size": 400, "width": 16, "layers": 1, "heads": 1, "max_length": 512},
        "data": {part: {"sources": [{"path": "pairs.jsonl"}]} for part in ("train", "eval")},
        "train": SMALL,
        **sections,
    }


def manifest(run: Path) -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text())


def test_a_config_from_another_folder_runs_on_the_cluster(site: Site, folder: Path) -> None:
    done = site.submit("mine.yaml", f"run.root={folder / 'runs'}", "optim.lr=1e-3", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    [run] = (folder / "runs" / "gram.finetune").iterdir()
    assert manifest(run)["status"] == "finished" and (run / "model" / "gram.json").exists()
    assert yaml.safe_load((run / "config.yaml").read_text())["optim"]["lr"] == 1e-3
    assert f"Run folder: {run}" in done.stdout  # the job's log, which names the folder that was promised
    assert f"Results:   {run}\n" in done.stderr and str(folder / "pairs.jsonl") in done.stderr
    assert (
        f"RAY_AUTH_MODE=token ray job stop --address {site.cluster.dashboard} gram-finetune-" in done.stderr
    )


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Eagleray as a wheel unpacks it, real folders in place of links and no repository around, as another version."""
    package = tmp_path / "site-packages" / "eagleray"
    shutil.copytree(ROOT / "eagleray", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").write_text('__version__ = "0.0.7"\n')
    return package.parent


def test_the_exit_code_is_the_jobs_and_a_relative_root_is_made_to_last(
    site: Site, folder: Path, installed: Path
) -> None:
    """Sent from an installed package: the cluster, which has another version, runs that one."""
    done = site.submit(
        "mine.yaml", "ray.num_workers=4", "train.micro_batch_size=1", cwd=folder, code=installed
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "places at most 2 such worker(s)" in done.stdout
    assert "`run.dir` is relative, and a submitted job's own folder does not last" in done.stdout
    [run] = (site.home / "runs" / "gram.finetune").iterdir()
    assert manifest(run)["status"] == "failed" and f"Results:   ~/{run.relative_to(site.home)}" in done.stderr
    assert manifest(run)["eagleray"] == "0.0.7"


def test_plain_ray_job_submit_of_the_working_tree(site: Site, tmp_path: Path) -> None:
    entrypoint = ["python", "-m", "eagleray.jobs.gram.finetune", "--config", str(TINY.relative_to(ROOT))]
    settings = [
        "train.max_steps=2",
        "train.eval_every=2",
        "data.synthetic.pairs=40",
        f"run.dir={tmp_path / 'run'}",
    ]
    command = [
        "ray.scripts.scripts",
        "job",
        "submit",
        "--address",
        site.cluster.dashboard,
        "--working-dir",
        ".",
    ]
    done = site.run(*command, "--", *entrypoint, *settings, cwd=ROOT, RAY_AUTH_MODE="token")
    assert done.returncode == 0, done.stdout + done.stderr
    assert manifest(tmp_path / "run")["status"] == "finished"


def test_a_job_that_is_not_waited_for_can_be_stopped(site: Site, folder: Path) -> None:
    done = site.submit(
        "mine.yaml", "--no-wait", "train.max_steps=100000", f"run.dir={folder / 'run'}", cwd=folder
    )
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr
    [stop] = re.findall(r"Stop it: +RAY_AUTH_MODE=token ray (.*)", done.stderr)
    while not (folder / "run" / "manifest.json").exists():
        time.sleep(0.2)
    stopped = site.run("ray.scripts.scripts", *stop.split(), cwd=folder, RAY_AUTH_MODE="token")
    assert stopped.returncode == 0, stopped.stderr
    log: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(site.token))
        assert connect(site.cluster.dashboard).follow(stop.split()[-1], log.append) == STOPPED
    assert f"Run folder: {folder / 'run'}" in "".join(log) and "was stopped" in log[-1]


def test_a_missing_and_a_wrong_token_are_told_apart(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(
        SubmissionError, match=r"asks for a token, and there is none in RAY_AUTH_TOKEN or .*token\. Copy"
    ):
        connect(site.cluster.dashboard)
    (tmp_path / "token").write_text("ab" * 32)
    with pytest.raises(SubmissionError, match=r"refuses the token\. Set RAY_AUTH_TOKEN_PATH"):
        connect(site.cluster.dashboard)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("localhost:8265", "The address is 'localhost:8265'; jobs go to the dashboard"),
        ("http://127.0.0.1:1", "Nothing answers at http://127.0.0.1:1"),
    ],
)
def test_addresses_that_are_no_dashboard(address: str, message: str) -> None:
    with pytest.raises(SubmissionError, match=message):
        connect(address)


def test_a_config_with_a_cluster_of_its_own_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=r"`ray\.address` is 'auto'; a submitted job runs on the cluster"):
        prepare(Path("mine.yaml"), ["ray.address=auto"])


def test_paths_of_the_config_no_longer_depend_on_the_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    job = prepare(
        Path("mine.yaml"), ["data.train.sources.0.path=pair*.jsonl", "data.eval.sources.0.path=hub/name"]
    )
    dumped = job.config.model_dump()["data"]
    assert dumped["train"][0]["sources"][0]["path"] == str(folder / "pair*.jsonl")
    assert dumped["eval"][0]["sources"][0]["path"] == "hub/name"  # nothing of this machine
    assert job.local_paths == [str(folder / "pair*.jsonl")]
    assert job.config.run.dir is not None and job.config.run.dir.startswith("runs/gram.finetune/")


def test_results_may_go_to_a_uri(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    job = prepare(Path("mine.yaml"), ["run.root=s3://bucket/runs/"])
    assert str(job.config.run.dir).startswith("s3://bucket/runs/gram.finetune/20")
    assert _places(job).startswith(f"Results:   {job.config.run.dir}\n")
    rendered = render(
        TINY, ["run.root=s3://bucket/runs", "kube.image=eagleray:1", "kube.storage_claim=files"]
    )
    assert "dir: s3://bucket/runs/gram.finetune/20" in rendered  # and not a folder of the claim


def test_the_address_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(SystemExit) as exit_:
        main(["submit", str(TINY)])
    assert (
        exit_.value.code == 2
        and "Give the dashboard of the cluster as `--address`" in capsys.readouterr().err
    )
