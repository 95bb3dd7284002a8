"""Experiments: jobs as stages of a graph, each known by a hash of all that goes into it.

A stage is a job's config in which `${name}` stands for the run folder of another stage, so that `${pretrain}/model`
is that stage's model. Its key is the sha256 of the job, the config, the contents of every file that the config names
and the keys of the stages it needs; its run folder carries the key. A stage whose folder holds a finished run is done,
whoever ran it and when; whatever changes gets another folder, and so does all that depends on it.

The key is of the config as written, without defaults: they belong to the version of the code, which each run's
manifest names. Nothing of a job is imported to find out that it is done.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Literal

from eagleray.platform import storage
from eagleray.platform.config import ConfigError, flatten
from eagleray.platform.runs import FREE_ON_RESUME, MANIFEST_FILE

State = Literal["done", "running", "begun", "new"]

_REFERENCE = re.compile(r"\$\{([^}]*)\}")
_KEY_LETTERS = 12
_LONGEST_PATH = 1024


@dataclass(frozen=True)
class Definition:
    """A stage as written."""

    job: str
    values: dict[str, Any]
    """Config of the job, with `${name}` for run folders of other stages."""
    after: tuple[str, ...] = ()
    """Stages that must be done before although the config does not refer to them."""

    @property
    def references(self) -> set[str]:
        """Names that stand in `${...}`."""
        return {name for text in _texts(self.values) for name in _REFERENCE.findall(text)}

    @property
    def needs(self) -> tuple[str, ...]:
        """Stages that come before, by name."""
        return tuple(sorted({*self.references, *self.after}))


@dataclass(frozen=True)
class Stage:
    """A stage with its place."""

    name: str
    job: str
    values: dict[str, Any]
    """Config of the job, with real paths and `run.dir`."""
    needs: tuple[str, ...]
    reads: tuple[Path, ...]
    """What the config names in run folders of other stages."""
    key: str
    folder: Path

    @property
    def state(self) -> State:
        """What the run folder tells; `running` in whatever process."""
        if storage.is_locked(self.folder):
            return "running"
        manifest = self.manifest
        return "new" if not manifest else "done" if manifest["status"] == "finished" else "begun"

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the run folder; empty if there is none."""
        path = self.folder / MANIFEST_FILE
        return storage.read_json(path) if path.is_file() else {}


def plan_stages(definitions: Mapping[str, Definition], root: Path) -> list[Stage]:
    """The stages in an order in which they can run, with keys and run folders below `root`.

    Raises:
        ConfigError: A stage refers to none that there is, or stages refer to each other in a circle.
    """
    root = root.absolute()
    hashes = _FileHashes(root)
    planned: dict[str, Stage] = {}
    for name in run_order({name: definition.needs for name, definition in definitions.items()}):
        definition = definitions[name]
        places = {need: planned[need].folder for need in definition.needs}
        content = {
            "job": definition.job,
            "config": _decisive(substitute(definition.values, {k: v.name for k, v in places.items()})),
            "files": hashes.of(definition.values),
            "after": [planned[need].key for need in definition.after],
        }
        key = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
        folder = root / "stages" / f"{name}-{key[:_KEY_LETTERS]}"
        values = substitute(definition.values, {k: str(v) for k, v in places.items()})
        run = {**(values.get("run") or {}), "dir": str(folder)}
        reads = tuple(Path(t) for t in _texts(values) if any(t.startswith(f"{p}/") for p in places.values()))
        planned[name] = Stage(
            name, definition.job, {**values, "run": run}, definition.needs, reads, key, folder
        )
    hashes.save()
    return list(planned.values())


def run_order(needs: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Names in an order in which each comes after those it needs; otherwise in the order given.

    Raises:
        ConfigError: A name that is needed is unknown, or needs run in a circle.
    """
    for name, needed in needs.items():
        unknown = [other for other in needed if other not in needs]
        if unknown:
            near = difflib.get_close_matches(unknown[0], needs, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise ConfigError(
                f"`stages.{name}` refers to a stage `{unknown[0]}`, which there is not.{hint} "
                f"The stages are: {', '.join(needs)}."
            )
    sorter = TopologicalSorter(needs)
    try:
        sorter.prepare()
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise ConfigError(
            f"Stages wait for each other in a circle: {circle}. Take one reference out."
        ) from None
    place, order = {name: number for number, name in enumerate(needs)}, []
    while sorter.is_active():
        ready = sorted(sorter.get_ready(), key=place.__getitem__)
        order += ready
        sorter.done(*ready)
    return order


def substitute(values: Any, places: Mapping[str, Any]) -> Any:
    """Nested values with every `${name}` replaced that `places` holds; one that stands alone keeps its type.

    >>> substitute({"model": {"path": "${a}/model"}, "n": "${n}"}, {"a": "/runs/a", "n": 1})
    {'model': {'path': '/runs/a/model'}, 'n': 1}
    """
    if isinstance(values, str):
        alone = _REFERENCE.fullmatch(values)
        if alone and alone[1] in places:
            return places[alone[1]]
        return _REFERENCE.sub(lambda match: str(places.get(match[1], match[0])), values)
    if isinstance(values, Mapping):
        return {key: substitute(value, places) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [substitute(value, places) for value in values]
    return values


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A config with keys of another laid over it; sections are entered, all else is replaced.

    >>> merged({"train": {"lr": 1, "steps": 2}, "model": None}, {"train": {"lr": 3}})
    {'train': {'lr': 3, 'steps': 2}, 'model': None}
    """
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = merged(old, value)
        result[key] = value
    return result


class _FileHashes:
    """sha256 of files; one that has neither another size nor another time is not read again."""

    def __init__(self, root: Path) -> None:
        self._root, self._path = root, root / "hashes.json"
        self._known: dict[str, Any] = storage.read_json(self._path) if self._path.is_file() else {}
        self._used: dict[str, Any] = {}

    def of(self, values: Any) -> dict[str, str]:
        """Hash by name of everything in nested values that names files: a file, a folder, a pattern with files.

        What lies in the experiment's folder is the work of stages, whose keys say what it is. A folder around it or
        around the working directory (the `.` of a path under some `root`) is no input: runs write there.
        """
        found: dict[str, str] = {}
        for text in _texts(values):
            if text and len(text) < _LONGEST_PATH and "\n" not in text and not _REFERENCE.search(text):
                files = sorted(self._files(text))
                if files:
                    lines = [f"{name} {self._sha256(path)}" for name, path in files]
                    found[text] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        return found

    def save(self) -> None:
        """Keep the hashes for the next time."""
        if self._used != self._known:
            self._root.mkdir(parents=True, exist_ok=True)
            storage.write_json(self._path, self._used)

    def _files(self, text: str) -> Iterator[tuple[str, Path]]:
        path = Path(text).expanduser()
        matches = [path] if path.exists() else []
        if not matches and glob.has_magic(text):
            matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        for match in matches:
            whole, root = match.resolve(), self._root.resolve()
            if whole.is_relative_to(root) or root.is_relative_to(whole) or Path.cwd().is_relative_to(whole):
                continue
            if whole.is_dir():
                yield from ((str(f.relative_to(whole)), f) for f in whole.rglob("*") if f.is_file())
            else:
                yield match.name, whole

    def _sha256(self, path: Path) -> str:
        status = path.stat()
        mark = [status.st_size, status.st_mtime_ns]
        known = self._used.get(str(path)) or self._known.get(str(path))
        if known is None or known[:2] != mark:
            with path.open("rb") as file:
                known = [*mark, hashlib.file_digest(file, "sha256").hexdigest()]
        self._used[str(path)] = known
        return known[2]


def _decisive(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flat config without what may differ between two attempts at one run."""
    free = tuple(FREE_ON_RESUME)
    return {
        key: value
        for key, value in flatten(dict(values)).items()
        if not any(key == name or key.startswith(f"{name}.") for name in free)
    }


def _texts(values: Any) -> Iterator[str]:
    if isinstance(values, str):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _texts(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _texts(value)
