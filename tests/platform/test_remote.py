"""Run folders at a URI: what is sent when, that a run goes on elsewhere bit for bit, and one driver at a time.

`file://` stands for object storage here: fsspec writes, lists and reads it by the same calls. What object stores lack
(appending, renaming) is forbidden in a test. Machines without a common disk are processes with a `EAGLERAY_WORK_DIR` each.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from toy_task import ToyTask, assert_identical, run_workers, toy_config, write_toy_data

from eagleray.platform import remote
from eagleray.platform.config import ConfigError, load_config
from eagleray.platform.lease import Lease
from eagleray.platform.remote import RemoteFolder, SharedFolder, TransferError, open_folder
from eagleray.platform.runs import RunFinishedError, RunFolder
from eagleray.platform.sections import TrainingConfig
from eagleray.platform.storage import LockHeldError
from eagleray.platform.training import run_training

JOB = "toy.train"


@pytest.fixture(autouse=True)
def work_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EAGLERAY_WORK_DIR", str(tmp_path / "work"))
    return tmp_path / "work"


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder behind `file://`, in which nothing can be appended to or renamed."""

    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError("object stores cannot do this")

    opened = LocalFileSystem._open

    def open_(self: LocalFileSystem, path: str, mode: str = "rb", **options: Any) -> Any:
        assert mode in ("rb", "wb")
        return opened(self, path, mode, **options)

    for name in ("mv", "touch"):
        monkeypatch.setattr(LocalFileSystem, name, refuse)
    monkeypatch.setattr(LocalFileSystem, "_open", open_)
    return tmp_path / "bucket"


def config(place: Path | str, *overrides: str) -> TrainingConfig:
    return load_config(TrainingConfig, None, [f"run.dir=file://{place}", *overrides])


def elsewhere(monkeypatch: pytest.MonkeyPatch, work: Path, name: str) -> None:
    """From here on this process is on another machine."""
    monkeypatch.setenv("EAGLERAY_WORK_DIR", str(work.with_name(name)))
    monkeypatch.setattr(socket, "gethostname", lambda: name)


def test_a_run_is_recorded_at_the_uri_and_found_there_from_another_machine(
    bucket: Path, work_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder.create(JOB, config(bucket / "run"))
    assert {"config.yaml", "manifest.json"} <= {p.name for p in (bucket / "run").iterdir()}
    assert run.path.is_relative_to(work_dir)
    with pytest.raises(RuntimeError, match="boom") as caught, run.recording():
        assert json.loads((bucket / "run/manifest.json").read_text())["status"] == "running"
        run.metrics.write_text('{"step": 1, "kind": "train", "time": 0, "loss": 1.0}\n')
        (run.path / "results").mkdir()
        (run.path / "results/scores.jsonl").write_text("{}\n")
        raise RuntimeError("boom")
    assert caught.value.__notes__ == [f"Run folder: file://{bucket / 'run'}"]
    assert (bucket / "run/results/scores.jsonl").exists()
    elsewhere(monkeypatch, work_dir, "moon")
    with pytest.raises(ConfigError, match=r"another config:\n  - train.seed: 0 -> 1"):
        RunFolder.create(JOB, config(bucket / "run", "train.seed=1"))
    again = RunFolder.create(JOB, config(bucket / "run"))
    assert again.resumed and again.path != run.path and (again.path / "results/scores.jsonl").exists()
    with again.recording():
        shutil.rmtree(again.path / "results")
        again.write_report({"accuracy": 0.5})
    manifest = json.loads((bucket / "run/manifest.json").read_text())
    assert [attempt["status"] for attempt in manifest["attempts"]] == ["failed", "finished"]
    assert json.loads((bucket / "run/report.json").read_text()) == {"accuracy": 0.5}
    assert not (bucket / "run/.lease.json").exists()
    with pytest.raises(RunFinishedError, match=r"run/report\.json holds its results"):
        RunFolder.create(JOB, config(bucket / "run"))


def test_what_cannot_be_used_is_refused_before_anything_runs(bucket: Path, tmp_path: Path) -> None:
    bucket.mkdir()
    (bucket / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"is not a run folder: it holds `thesis\.tex`"):
        RunFolder.create(JOB, config(bucket))
    with pytest.raises(ConfigError, match=r"run folder is xyz://a/b, .*Protocol not known"):
        RunFolder.create(JOB, load_config(TrainingConfig, None, ["run.dir=xyz://a/b"]))
    with pytest.raises(ConfigError, match=r"run folder cannot be written \(file://.*NotADirectoryError"):
        RunFolder.create(JOB, config(bucket / "thesis.tex" / "run"))
    with pytest.raises(
        ConfigError, match=r"of `gram.demo` are written by several processes, which need a path"
    ):
        RunFolder.create("gram.demo", config(bucket / "run"), shared=True)


def test_results_that_cannot_be_sent_are_not_called_finished(
    bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder.create(JOB, config(bucket / "run"))

    def broken(*_: Any, **__: Any) -> None:
        raise PermissionError("no more")

    with (
        pytest.raises(TransferError, match=r"could not be sent \(file://.*: no more\); it lies in .* Resume"),
        run.recording(),
    ):
        run.write_report({"accuracy": 1.0})
        monkeypatch.setattr(LocalFileSystem, "put_file", broken)
    assert json.loads((bucket / "run/manifest.json").read_text())["status"] == "running"
    assert run.report.exists()


def test_one_driver_at_a_time(bucket: Path, work_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same machine the lock of the working copy tells; on another one only whether the lease is renewed."""
    run = RunFolder.create(JOB, config(bucket / "run"))
    with pytest.raises(ConfigError, match=r"is in use by process \d+ on .* Wait for it to end"):
        RunFolder.create(JOB, config(bucket / "run"))
    run.close()
    uri = f"file://{bucket / 'run'}"
    lost = threading.Event()
    first = Lease(RemoteFolder(uri), lasts_s=1.0, lost=lost.set)
    first.acquire()
    elsewhere(monkeypatch, work_dir, "moon")
    other = RemoteFolder(uri)
    with pytest.raises(LockHeldError, match="is in use by process"):
        Lease(other, lasts_s=1.0).acquire()
    # A driver that gave no sign of life and wakes up finds that the run is no longer its own.
    (bucket / "run/.lease.json").write_text(
        json.dumps({"token": "x", "process": 1, "machine": "sun", "copy": "sun /run", "since": "then"})
    )
    assert lost.wait(30)
    taken = Lease(other, lasts_s=1.0)
    taken.acquire()  # nobody renews the one of "sun"
    taken.release()
    assert not (bucket / "run/.lease.json").exists()


def test_a_folder_is_replaced_as_a_whole(bucket: Path, work_dir: Path) -> None:
    folder = RemoteFolder(f"file://{bucket}")
    (folder.path / "model").mkdir(parents=True)
    for name in ("config.json", "weights.bin", "old.bin"):
        (folder.path / "model" / name).write_text("1")
    folder.send("model")
    (folder.path / "model/old.bin").unlink()
    (folder.path / "model/weights.bin").write_text("2")
    put, seen = LocalFileSystem.put_file, []

    def spy(self: LocalFileSystem, path: str, target: str, **options: Any) -> None:
        seen.append((Path(target).name, (bucket / "model/config.json").exists()))
        put(self, path, target, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalFileSystem, "put_file", spy)
        folder.send("model")
    assert seen == [("weights.bin", False), ("config.json", False)]
    assert {p.name: p.read_text() for p in (bucket / "model").iterdir()} == {
        "config.json": "1",
        "weights.bin": "2",
    }
    (folder.path / "model/weights.bin").write_text("3")
    folder.receive("model")
    assert (folder.path / "model/weights.bin").read_text() == "2"


def test_a_record_that_several_read_is_there_and_whole_while_it_is_fetched(
    bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RemoteFolder(f"file://{bucket}/run")
    folder.write_text("metrics.jsonl", "old")
    folder.receive("metrics.jsonl")
    folder.write_text("metrics.jsonl", "new, and longer")
    fetched, seen = LocalFileSystem.get, []

    def get(fs: LocalFileSystem, sources: Any, targets: list[str], **options: Any) -> None:
        Path(targets[0]).write_text("new,")  # half of it has come
        seen.append((folder.path / "metrics.jsonl").read_text())
        fetched(fs, sources, targets, **options)

    monkeypatch.setattr(LocalFileSystem, "get", get)
    folder.receive("metrics.jsonl")
    assert seen == ["old"]
    assert (folder.path / "metrics.jsonl").read_text() == "new, and longer"
    assert [path.name for path in folder.path.iterdir()] == ["metrics.jsonl"]
    folder.remove("metrics.jsonl")
    (folder.path / "metrics.jsonl").write_text("left from before")
    folder.receive("metrics.jsonl")
    assert not (folder.path / "metrics.jsonl").exists()


def _train(place: str, *overrides: str) -> dict[str, float] | None:
    """What `launch` does, without Ray: every worker is a machine of its own."""
    rank = dist.get_rank()
    os.environ |= {"EAGLERAY_WORK_DIR": f"{os.environ['DISKS']}/{rank}", "LOCAL_RANK": "0"}
    folder = open_folder(place)
    if rank == 0 and not (folder.path / "data").exists() and isinstance(folder, RemoteFolder):
        if "data" in folder.names():
            folder.receive_data()
        else:
            write_toy_data(folder.path / "data")
            folder.send_data()
    elif rank == 0 and not (folder.path / "data").exists():
        write_toy_data(folder.path / "data")
    dist.barrier()
    folder.receive_data()
    cfg = toy_config(*overrides)
    return run_training(ToyTask(cfg, folder.path / "data"), cfg, folder)


STAGES = (0, 3)
SETTINGS = ["train.micro_batch_size=4", "dropout=0.2", "train.eval_every=2", "train.average_best=2"]


def _lives(rank: int, root: str) -> None:
    """Fail twice, each time on new disks, and go on to the end; then the same without a disturbance."""
    for stage in STAGES:
        place, settings = f"file://{root}/bucket-{stage}", [*SETTINGS, f"deepspeed.zero_stage={stage}"]
        for life, calls in enumerate((7, 4)):
            os.environ["DISKS"] = f"{root}/{stage}/disks-{life}"
            ToyTask.crash_at_call = calls
            with pytest.raises(ConnectionError, match="injected crash"):
                _train(place, *settings)
            dist.barrier()
            if rank == 0:
                shutil.rmtree(os.environ["DISKS"])
            dist.barrier()
        ToyTask.crash_at_call = None
        os.environ["DISKS"] = f"{root}/{stage}/disks"
        assert _train(place, *settings) is not None
        assert _train(f"{root}/whole-{stage}", *settings) is not None


@pytest.mark.ray
def test_two_machines_without_a_common_disk_go_on_after_both_are_gone(tmp_path: Path) -> None:
    run_workers(_lives, 2, str(tmp_path))
    for stage in STAGES:
        bucket = tmp_path / f"bucket-{stage}"
        assert_identical(bucket, tmp_path / f"whole-{stage}")
        assert len(list((bucket / "checkpoints").glob("*/checkpoint.json"))) == 2
        assert not list((tmp_path / f"{stage}/disks").rglob("*states.pt")), "checkpoints lie at the URI only"


RESHARDED = ["optim.eps=0.001", "train.keep_model=last", "train.micro_batch_size=4", "deepspeed.zero_stage=2"]


def _one_machine(rank: int, root: str) -> None:
    """Steps 4 and 8 are saved; the latter is damaged later."""
    os.environ["DISKS"] = f"{root}/one"
    ToyTask.crash_at_call = 22  # in step 11, long after step 8 was written
    with pytest.raises(ConnectionError):
        _train(f"file://{root}/bucket", *RESHARDED)
    ToyTask.crash_at_call = None
    _train(f"{root}/whole", *RESHARDED)


def _two_machines(rank: int, root: str) -> None:
    os.environ["DISKS"] = f"{root}/two"
    _train(f"file://{root}/bucket", *RESHARDED)


@pytest.mark.ray
def test_more_machines_go_on_from_the_last_checkpoint_that_is_whole(tmp_path: Path) -> None:
    run_workers(_one_machine, 1, str(tmp_path))
    bucket = tmp_path / "bucket"
    newest = max(bucket.glob("checkpoints/*/state/*optim_states.pt"))
    assert "step-00000008" in str(newest)
    newest.write_bytes(newest.read_bytes()[:-10])
    run_workers(_two_machines, 2, str(tmp_path))
    losses = [
        [json.loads(line).get("loss") for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (bucket, tmp_path / "whole")
    ]
    assert len(losses[0]) == len(losses[1]) and losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert not [path for path in bucket.rglob("*universal*") if path.is_file()]


def test_worker_0_starts_from_the_uri_whatever_lies_on_its_disk(
    bucket: Path, work_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids of remote trackers included, so that a run goes on in the same place there."""
    run = RunFolder.create(JOB, config(bucket / "run"))
    for name in ("metrics.jsonl", "tracking.json"):
        (bucket / "run" / name).write_text("sent")
    elsewhere(monkeypatch, work_dir, "moon")
    other = RemoteFolder(f"file://{bucket / 'run'}")
    for name in ("metrics.jsonl", "stop", "model"):
        (other.path / name).write_text("left by an earlier attempt")
    other.begin_writing()
    assert {p.name: p.read_text() for p in other.path.iterdir() if p.name != "config.yaml"} == {
        "metrics.jsonl": "sent",
        "tracking.json": "sent",
    }
    assert (other.path / "config.yaml").read_text() == run.config.read_text()
    (other.path / "metrics.jsonl").write_text("more")
    other.freeze("metrics.jsonl")()
    run.folder.receive_results()  # the driver's part, when the workers are done
    assert run.metrics.read_text() == "more"
    run.close()


def test_a_path_carries_nothing(tmp_path: Path) -> None:
    folder = open_folder(str(tmp_path))
    assert type(folder) is SharedFolder and folder.path == tmp_path
    folder.freeze("model")()
    folder.receive("model")
    assert folder.names() == []


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_backends_without_folders(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec's store in memory, plain and through the asynchronous calls that those of the clouds use."""
    store = MemoryFileSystem()
    place, root = "memory://bucket/run", f"/{tmp_path.name}/run"
    fs = AsyncFileSystemWrapper(store) if asynchronous else store
    monkeypatch.setattr(remote, "url_to_fs", lambda _: (fs, root))
    run = RunFolder.create(JOB, load_config(TrainingConfig, None, [f"run.dir={place}"]))
    folder = run.folder
    with run.recording():
        for step in (1, 2):
            partial = run.checkpoints / f"step-{step:08d}.partial"
            (partial / "state").mkdir(parents=True)
            (partial / "state/shard.pt").write_text("0")
            (partial / "checkpoint.json").write_text("{}")
            folder.send_files(partial, ["state/shard.pt"])
            if step == 1:
                folder.publish(partial)
            folder.forget(run.checkpoints)
        assert folder.checkpoints() == ["step-00000001"]
        folder.remove_unfinished_checkpoints()
        assert not [name for name in store.find(root) if "step-00000002" in name]
        folder.receive("checkpoints/step-00000001")
        assert (run.checkpoints / "step-00000001/state/shard.pt").read_text() == "0"
        folder.remove("checkpoints/step-00000001")
        assert folder.checkpoints() == []
        run.model.mkdir()
        (run.model / "config.json").write_text("{}")
    assert {"config.yaml", "manifest.json", "model"} <= set(folder.names())
    assert store.cat_file(f"{root}/model/config.json") == b"{}"
    with pytest.raises(RunFinishedError):
        RunFolder.create(JOB, load_config(TrainingConfig, None, [f"run.dir={place}"]))
