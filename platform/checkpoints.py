"""Checkpoints that are whole or not there.

Every worker writes its shard into `step-00000100.partial/` on the storage all workers share; then each hashes
its part of the files, worker 0 writes `checkpoint.json` with the hashes and renames the folder. A folder
without `.partial` is thus complete, and what happened to it later (truncation, a lost shard) shows in the
hashes. docs/decisions/0002-checkpoints.md says why Ray Train does not own these files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

logger = logging.getLogger(__name__)

_MANIFEST = "checkpoint.json"
_STATE = "state"
_PARTIAL = ".partial"


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


def save_checkpoint(engine: Any, root: Path, state: LoopState, *, config_hash: str, keep: int) -> Path:
    """Write the checkpoint of `state.step`; a collective call. Older ones beyond `keep` go afterwards.

    Raises:
        CheckpointError: It can't be written (e.g. the disk is full); earlier checkpoints are untouched.
    """
    final = root / f"step-{state.step:08d}"
    partial = final.with_name(final.name + _PARTIAL)
    rank = dist.get_rank()
    try:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        engine.save_checkpoint(str(partial), tag=_STATE, save_latest=False)
        dist.barrier()
        files = _hash_files(partial)
        if rank == 0:
            manifest = {
                "loop": asdict(state),
                "config_hash": config_hash,
                "world_size": dist.get_world_size(),
                "zero_stage": engine.zero_optimization_stage(),
                "files": files,
            }
            _write_synced(partial / _MANIFEST, json.dumps(manifest, indent=1))
            shutil.rmtree(final, ignore_errors=True)  # a damaged one that the run fell back from
            partial.rename(final)
            for old in _complete(root)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
        dist.barrier()
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"The checkpoint of step {state.step} could not be written to {root}: {error}. "
            "Earlier checkpoints are whole: make room and resume the run."
        ) from error
    return final


def restore_checkpoint(engine: Any, root: Path, *, config_hash: str) -> LoopState | None:
    """Load the newest whole checkpoint into a fresh engine; a collective call.

    Returns:
        The loop state, or `None` if the run has no checkpoint yet.

    Raises:
        CheckpointError: There are checkpoints, but none is whole or fits this run.
    """
    problems: list[str] = []
    for path in reversed(_complete(root)):
        problem = _problem(path, engine, config_hash)
        if problem is None:
            engine.load_checkpoint(str(path), tag=_STATE)
            return LoopState(**json.loads((path / _MANIFEST).read_text())["loop"])
        problems.append(f"{path.name}: {problem}")
        if dist.get_rank() == 0:
            logger.warning("Checkpoint %s is not used: %s.", path, problem)
    if problems:
        raise CheckpointError(
            f"No checkpoint in {root} can be used ({'; '.join(problems)}). Restore a folder, or start anew with another `run.dir`."
        )
    return None


def clean_partial(root: Path) -> None:
    """Remove what a killed run left half-written."""
    for path in root.glob(f"step-*{_PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def _complete(root: Path) -> list[Path]:
    return sorted(p for p in root.glob("step-*") if p.is_dir() and not p.name.endswith(_PARTIAL))


def _problem(path: Path, engine: Any, config_hash: str) -> str | None:
    """Why a checkpoint can't be used, agreed among all workers; each checks its share of the hashes."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{_MANIFEST} is missing or unreadable"
    if manifest["config_hash"] != config_hash:
        return "it belongs to a run with another config"
    world, stage = dist.get_world_size(), engine.zero_optimization_stage()
    if stage > 0 and (manifest["world_size"], manifest["zero_stage"]) != (world, stage):
        return (
            f"it was written by {manifest['world_size']} worker(s) at ZeRO stage {manifest['zero_stage']}; "
            f"this run has {world} at stage {stage}"
        )
    mine = None
    for name, digest in _share(sorted(manifest["files"].items())):
        file = path / name
        if not file.is_file():
            mine = f"{name} is missing"
        elif _sha256(file) != digest:
            mine = f"{name} is damaged (its hash is not the recorded one)"
        if mine:
            break
    everyone: list[str | None] = [None] * world
    dist.all_gather_object(everyone, mine)
    return next((problem for problem in everyone if problem), None)


def _hash_files(folder: Path) -> dict[str, str]:
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    mine = {name: _sha256(folder / name) for name in _share(names)}
    everyone: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    return {name: digest for part in everyone for name, digest in part.items()}


def _share(items: list[Any]) -> list[Any]:
    return items[dist.get_rank() :: dist.get_world_size()]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
