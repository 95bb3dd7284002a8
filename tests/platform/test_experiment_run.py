"""Stages as processes: side by side, failing, skipped, interrupted, resumed. The job is a script of a few lines."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from eagleray.platform import storage
from eagleray.platform.experiment import Definition, Stage, plan_stages
from eagleray.platform.experiment_run import Need, Outcome, run_stages

# Does what its config says, and records it as a run: imports nothing of ours, so that a stage takes no time.
SCRIPT = """
import json, os, pathlib, signal, sys, time
import yaml
cfg = yaml.safe_load(open(sys.argv[1]))
run = pathlib.Path(cfg["run"]["dir"])
run.mkdir(parents=True, exist_ok=True)
def record(status, **fields):
    text = json.dumps({"status": status, "job": cfg["job"], "attempts": [fields]})
    (run / "new").write_text(text); os.replace(run / "new", run / "manifest.json")
def stop(number, frame):
    record("interrupted"); sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
record("running")
deadline = time.monotonic() + 60
for path in cfg.get("wait_for", []):
    while not pathlib.Path(path).exists():
        if time.monotonic() > deadline: sys.exit("nobody came")
        time.sleep(0.01)
if cfg.get("fail"):
    record("failed", error="ValueError: as told"); sys.exit(2)
if cfg.get("crash"):
    print("out of luck", file=sys.stderr); os._exit(1)
(run / "model").write_text(os.environ["OMP_NUM_THREADS"] + " " + os.environ.get("CUDA_VISIBLE_DEVICES", "-"))
record("finished")
"""


class Lab:
    """An experiment folder and the script."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "experiment"
        self.script = folder / "job.py"
        self.script.write_text(SCRIPT)

    def run(
        self, definitions: dict[str, Definition], *, have: Need | None = None, **options: Any
    ) -> dict[str, Outcome]:
        needs = dict.fromkeys(definitions, options.pop("need", Need(1)))
        stages = plan_stages(definitions, self.root)
        launcher = [sys.executable, str(self.script)]
        return run_stages(
            stages, self.root, launcher, needs, have or Need(2), **{"assign_gpus": False, **options}
        )

    def stages(self, definitions: dict[str, Definition]) -> dict[str, Stage]:
        return {stage.name: stage for stage in plan_stages(definitions, self.root)}


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def test_a_failure_takes_what_depends_on_it_and_no_more_and_the_next_run_goes_on(lab: Lab) -> None:
    definitions = {
        "good": Definition("x", {}),
        "told": Definition("x", {"fail": True}),
        "crashed": Definition("x", {"crash": True}),
        "after_good": Definition("x", {"model": "${good}/model"}),
        "after_told": Definition("x", {"model": "${told}/model"}),
        "after_that": Definition("x", {}, after=("after_told",)),
    }
    found = lab.run(definitions)
    assert {name: outcome.status for name, outcome in found.items()} == {
        "good": "finished",
        "told": "failed",
        "crashed": "failed",
        "after_good": "finished",
        "after_told": "skipped",
        "after_that": "skipped",
    }
    assert found["told"].error == "ValueError: as told" and found["crashed"].error == "out of luck"
    assert found["after_that"].error == "needs after_told"
    mended = {**definitions, "told": Definition("x", {}), "crashed": Definition("x", {"n": 1})}
    again = lab.run(mended)
    assert {name for name, outcome in again.items() if outcome.status == "done"} == {"good", "after_good"}
    assert {outcome.status for outcome in again.values()} == {"done", "finished"}


def test_independent_stages_run_side_by_side_each_with_its_share(lab: Lab) -> None:
    """Each waits until the other has begun: one after the other, neither would end."""
    first, second = (lab.root / "stages" / name for name in ("a", "b"))
    definitions = {
        "a": Definition("x", {"wait_for": [str(second)]}),
        "b": Definition("x", {"wait_for": [str(first)]}),
    }
    planned = lab.stages(definitions)
    # The names of the folders hold the keys, so the marks are links made under the names that the configs know.
    (lab.root / "stages").mkdir(parents=True)
    for mark, name in ((first, "a"), (second, "b")):
        mark.symlink_to(planned[name].folder)
    found = lab.run(definitions, have=Need(4, 2), need=Need(2, 1), assign_gpus=True)
    assert [outcome.status for outcome in found.values()] == ["finished", "finished"]
    given = sorted((planned[name].folder / "model").read_text().split()[1] for name in "ab")
    assert given == ["0", "1"], "each has a GPU of its own"


def test_a_missing_output_is_named_before_the_stage_starts(lab: Lab) -> None:
    found = lab.run({"a": Definition("x", {}), "b": Definition("x", {"model": "${a}/modle"})})
    assert found["b"].status == "failed"
    assert "modle is not there" in found["b"].error and "manifest.json, model" in found["b"].error


def test_another_process_at_work_is_waited_for(lab: Lab) -> None:
    """As after a kill of the experiment, whose stages go on by themselves."""
    definitions = {"a": Definition("x", {})}
    folder = lab.stages(definitions)["a"].folder
    folder.mkdir(parents=True)
    lock = storage.FolderLock(folder)
    lock.acquire()
    found: dict[str, Outcome] = {}
    runner = threading.Thread(target=lambda: found.update(lab.run(definitions)))
    runner.start()
    storage.write_json(folder / "manifest.json", {"status": "finished", "attempts": [{}]})
    lock.release()
    runner.join(60)
    assert found["a"].status in ("finished", "done") and not (lab.root / "configs").exists()


def test_a_signal_reaches_the_stages_and_the_next_run_resumes_them(lab: Lab, tmp_path: Path) -> None:
    mark = tmp_path / "go"
    driver = (
        "import sys, pathlib\n"
        "from eagleray.platform.experiment import Definition, plan_stages\n"
        "from eagleray.platform.experiment_run import Need, run_stages\n"
        f"root = pathlib.Path({str(lab.root)!r})\n"
        f"stages = plan_stages({{'a': Definition('x', {{'wait_for': [{str(mark)!r}]}})}}, root)\n"
        f"run_stages(stages, root, [sys.executable, {str(lab.script)!r}], {{'a': Need()}}, Need(), assign_gpus=False)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", driver], stderr=subprocess.PIPE, text=True)
    definitions = {"a": Definition("x", {"wait_for": [str(mark)]})}
    manifest = lab.stages(definitions)["a"].folder / "manifest.json"
    deadline = time.monotonic() + 60
    while not manifest.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=60)
    assert process.returncode and "RunInterrupted" in messages
    assert json.loads(manifest.read_text())["status"] == "interrupted"
    mark.touch()
    assert lab.run(definitions)["a"].status == "finished"
