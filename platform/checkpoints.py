"""Checkpoints that are whole or not there, written beside training.

Saving has two parts. Between two steps every worker copies its shard of the state into host memory
(`Checkpointer.begin`); a thread then hashes the copy and writes it into `step-00000100.partial/` on the storage
all workers share, while training goes on. When all workers have written, worker 0 adds `checkpoint.json` with
the hashes and renames the folder (`Checkpointer.finish`). A folder without `.partial` is thus complete, and what
happened to it later (truncation, a lost shard) shows in the hashes. The thread only writes its own files: what
the workers have to agree on happens in `begin` and `finish`, which all of them call at the same step.

Where the run folder is a URI (`remote.py`), `.partial` lies in the working copy of each machine, and the thread also
sends its files; a checkpoint is then complete when `checkpoint.json` has been sent.

docs/decisions/0002-checkpoints.md says why Ray Train does not own these files.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from eagleray.platform.remote import (
    CHECKPOINT_MANIFEST,
    PARTIAL,
    WORKERS_PARTS,
    SharedFolder,
    is_uri,
    leads_node,
    open_folder,
)
from eagleray.platform.universal import load_universal, write_universal

logger = logging.getLogger(__name__)

_STATE = "state"


class CheckpointError(ValueError):
    """A checkpoint can't be written, or none of a run's can be used; the message says what is wrong."""


@dataclass
class LoopState:
    """Where the loop is. Data order and random numbers follow from the seed and `step`, so this is all."""

    step: int = 0
    """Optimiser steps done."""
    examples: int = 0
    """Training examples seen."""
    tokens: int = 0
    """Training tokens seen, padding not counted."""
    best: float | None = None
    """Best value of the selection metric so far."""
    best_step: int | None = None
    """Step of `best`."""
    best_models: dict[str, float] = field(default_factory=dict)
    """Steps whose models are kept for averaging, with their values, the best first."""
    stale: int = 0
    """Evaluations since `best`."""
    window: dict[str, float] = field(default_factory=dict)
    """Sums since the last logged line."""
    last_eval: dict[str, float] = field(default_factory=dict)
    """Metrics of the last evaluation."""


class Checkpointer:
    """The checkpoints of one run; every worker has one, and all call its methods at the same step.

    Args:
        engine: The DeepSpeed engine whose state is saved.
        folder: The run folder.
        config_hash: Hash of what must not change between a checkpoint and the run that resumes from it.
        keep: How many of the latest checkpoints stay.
    """

    def __init__(self, engine: Any, folder: SharedFolder, *, config_hash: str, keep: int) -> None:
        self._engine, self._folder, self._config_hash, self._keep = engine, folder, config_hash, keep
        self._root, self._place = folder.path / "checkpoints", f"{folder.place}/checkpoints"
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._snapshots: dict[Path, io.BytesIO] = {}
        engine.checkpoint_engine.save = self._snapshot  # each file that DeepSpeed would write comes here
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._saved_step = 0

    @property
    def written(self) -> bool:
        """Whether this worker's part of the checkpoint that is under way, if any, is on the disk (or failed)."""
        return self._pending is None or self._pending.files.done()

    def begin(self, state: LoopState) -> None:
        """Copy the state of this step and let a thread write it; one still under way is finished first.

        Raises:
            CheckpointError: The one under way could not be written, or the new one cannot be begun.
        """
        self.finish()
        if state.step == self._saved_step:
            return
        partial = self._root / f"step-{state.step:08d}{PARTIAL}"
        with self._explained(state.step, partial):
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            dist.barrier()
            partial.mkdir(parents=True, exist_ok=True)  # on other machines, if the run folder is a URI
            self._engine.save_checkpoint(str(partial), tag=_STATE, save_latest=False)
            # What the state refers to must be there when the checkpoint counts.
            send = self._folder.freeze(*WORKERS_PARTS) if self._rank == 0 else None
        snapshots, self._snapshots = self._snapshots, {}
        files = self._thread.submit(self._write, snapshots, partial, send)
        self._pending = _Pending(state.step, asdict(state), partial, files)
        self._saved_step = state.step

    def finish(self) -> None:
        """Wait for the files of the checkpoint under way, if any, and make it valid.

        Raises:
            CheckpointError: It can't be written (e.g. the disk is full); earlier checkpoints are untouched.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        problem, mine = None, {}
        try:
            mine = pending.files.result()
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            problem = f"{error}"
        everyone: list[Any] = [None] * self._world_size
        dist.all_gather_object(everyone, (mine, problem))
        problem = next((found for _, found in everyone if found), None)
        if problem is None and self._rank == 0:
            try:
                self._commit(pending, {name: digest for part, _ in everyone for name, digest in part.items()})
            except OSError as error:
                problem = f"{error}"
        outcome = [problem]
        dist.broadcast_object_list(outcome, src=0)
        if outcome[0]:
            with self._explained(pending.step, pending.folder):
                raise OSError(outcome[0])
        self._folder.forget(pending.folder)

    def restore(self) -> LoopState | None:
        """Load the newest whole checkpoint into the fresh engine.

        One that another number of workers wrote is converted first (`universal.py`), if ZeRO had sharded it.

        Returns:
            The loop state, or `None` if the run has no checkpoint yet.

        Raises:
            CheckpointError: There are checkpoints, but none is whole or fits this run.
        """
        if self._rank == 0:
            self._folder.remove_unfinished_checkpoints()
        dist.barrier()
        problems: list[str] = []
        for name in reversed(self._folder.checkpoints()):
            path = self._root / name
            if leads_node():
                self._folder.receive(f"checkpoints/{name}")
            dist.barrier()
            problem = self._problem(path, config_hash=self._config_hash)
            if problem is None:
                state = self._load(path)
                dist.barrier()
                self._folder.forget(self._root)
                return state
            problems.append(f"{name}: {problem}")
            if self._rank == 0:
                logger.warning("Checkpoint %s/%s is not used: %s.", self._place, name, problem)
        if problems:
            raise CheckpointError(
                f"No checkpoint in {self._place} can be used ({'; '.join(problems)}). Restore a folder, or start "
                "anew with another `run.dir`."
            )
        return None

    def start_from(self, place: str) -> LoopState:
        """Load a checkpoint of another run, which may have had another config, into the fresh engine.

        Args:
            place: Its folder, a path or URI.

        Returns:
            How far the other run was. What it held for its best model is left behind: that lies in its own folder.

        Raises:
            CheckpointError: The checkpoint is missing, damaged or of another shape.
        """
        path = self._copy_of(place) if is_uri(place) else Path(place)
        problem = self._problem(path, config_hash=None)
        if problem is not None:
            raise CheckpointError(f"`train.start_from` is {place}, which cannot be used: {problem}.")
        state = self._load(path)
        if is_uri(place):
            dist.barrier()
            shutil.rmtree(path, ignore_errors=True)
        self._saved_step = 0  # the step is saved, but not in this run
        return LoopState(step=state.step, examples=state.examples, tokens=state.tokens)

    def _copy_of(self, uri: str) -> Path:
        """On every machine, a copy of a checkpoint that lies at a URI; of this run alone, as others may start from it too."""
        source = open_folder(uri)
        path = source.path / hashlib.sha256(self._place.encode()).hexdigest()[:12]
        if leads_node():
            shutil.rmtree(path, ignore_errors=True)
            source.copy_to("", path)
        dist.barrier()
        return path

    def close(self) -> None:
        """End the thread; a checkpoint that is not finished by then is dropped."""
        self._thread.shutdown()

    def _snapshot(self, state_dict: Any, path: str) -> None:
        # The older format is a plain copy of the tensors; the zip format also computes a checksum, as we do.
        self._snapshots[Path(path)] = buffer = io.BytesIO()
        torch.save(state_dict, buffer, _use_new_zipfile_serialization=False)

    def _write(
        self, snapshots: dict[Path, io.BytesIO], partial: Path, send: Callable[[], None] | None
    ) -> dict[str, str]:
        """Runs in the thread."""
        files = _write_files(snapshots, partial)
        self._folder.send_files(partial, files)
        if send is not None:
            send()
        return files

    def _load(self, path: Path) -> LoopState:
        manifest = json.loads((path / CHECKPOINT_MANIFEST).read_text())
        if manifest["world_size"] == self._world_size or not _is_sharded(manifest):
            self._engine.load_checkpoint(str(path), tag=_STATE)
        else:
            self._load_resharded(path, manifest["world_size"])
        state = LoopState(**manifest["loop"])
        self._saved_step = state.step
        return state

    def _load_resharded(self, path: Path, writers: int) -> None:
        """The hashes of `path` have been checked; its converted copy lives only until it is loaded."""
        scratch = path.with_name(f"{path.name}.universal{PARTIAL}")
        problem = [None]
        if self._rank == 0:
            logger.info(
                "Checkpoint %s was written by %d worker(s); its shards are joined for %d worker(s).",
                path,
                writers,
                self._world_size,
            )
            try:
                write_universal(path / _STATE, scratch / _STATE)
                self._folder.send(f"checkpoints/{scratch.name}")
            except (OSError, RuntimeError) as error:
                problem = [f"{error}"]
        dist.broadcast_object_list(problem, src=0)
        if problem[0]:
            raise CheckpointError(
                f"{path} was written by {writers} worker(s) and could not be converted for {self._world_size}: "
                f"{problem[0]}. Make room, or resume with `ray.num_workers={writers}`."
            )
        if self._rank != 0 and leads_node():
            self._folder.receive(f"checkpoints/{scratch.name}")
        dist.barrier()
        load_universal(self._engine, scratch, tag=_STATE)
        dist.barrier()
        if self._rank == 0:
            self._folder.remove(f"checkpoints/{scratch.name}")

    def _problem(self, path: Path, *, config_hash: str | None) -> str | None:
        """Why a checkpoint can't be used, agreed among all workers; each checks its share of the hashes."""
        try:
            manifest = json.loads((path / CHECKPOINT_MANIFEST).read_text())
        except (OSError, ValueError):
            return f"{CHECKPOINT_MANIFEST} is missing or unreadable"
        if config_hash is not None and manifest["config_hash"] != config_hash:
            return "it belongs to a run with another config"
        mine = None
        for name, digest in sorted(manifest["files"].items())[self._rank :: self._world_size]:
            file = path / name
            if not file.is_file():
                mine = f"{name} is missing"
            elif _sha256(file) != digest:
                mine = f"{name} is damaged (its hash is not the recorded one)"
            if mine:
                break
        everyone: list[str | None] = [None] * self._world_size
        dist.all_gather_object(everyone, mine)
        return next((problem for problem in everyone if problem), None)

    def _commit(self, pending: _Pending, files: dict[str, str]) -> None:
        folder = pending.folder
        # What DeepSpeed itself put there, such as its script that extracts the weights.
        others = {p for p in folder.rglob("*") if p.is_file()} - {folder / name for name in files}
        names = {str(p.relative_to(folder)): p for p in others}
        self._folder.send_files(folder, names)
        manifest = {
            "loop": pending.loop,
            "config_hash": self._config_hash,
            "world_size": self._world_size,
            "zero_stage": self._engine.zero_optimization_stage(),
            "files": files | {name: _sha256(path) for name, path in names.items()},
        }
        _write_synced(folder / CHECKPOINT_MANIFEST, json.dumps(manifest, indent=1).encode())
        self._folder.publish(folder)
        for old in self._folder.checkpoints()[: -self._keep]:
            self._folder.remove(f"checkpoints/{old}")

    @contextmanager
    def _explained(self, step: int, partial: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"The checkpoint of step {step} could not be written to {self._place}: {error}. "
                "Earlier checkpoints are whole: make room and resume the run."
            ) from error


@dataclass
class _Pending:
    """A checkpoint between `begin` and `finish`."""

    step: int
    loop: dict[str, Any]
    folder: Path
    files: Future[dict[str, str]]
    """Name -> hash of what this worker wrote."""


def _write_files(files: dict[Path, io.BytesIO], folder: Path) -> dict[str, str]:
    """Hashing and writing leave the interpreter to the training loop."""
    digests = {}
    while files:
        path, buffer = files.popitem()
        with buffer.getbuffer() as content:
            digests[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
            _write_synced(path, content)
    return digests


def _is_sharded(manifest: dict[str, Any]) -> bool:
    return any(name.endswith("optim_states.pt") for name in manifest["files"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, content: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
