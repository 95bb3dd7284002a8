"""Where a run folder is kept: a folder that all nodes see, or an fsspec URI with a working copy on each node.

On object storage nothing is appended to, renamed or locked, so no part of a run works there directly. Each machine
has a working copy, in which everything is done as in any other folder, and sends files to the URI when they are
whole. `SharedFolder` has the same methods and nothing to carry. docs/decisions/0012-uri-run-folders.md has the reasons.

Who sends what: the driver what it writes itself (config, manifest, examples, reports, plots); every training worker
its shard of a checkpoint; worker 0 what `WORKERS_PARTS` names, as of the step of each checkpoint, before that
checkpoint counts. So the URI always holds a run that goes on from its last checkpoint as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.core import url_to_fs

from eagleray.platform.config import ConfigError

logger = logging.getLogger(__name__)

WORKERS_PARTS = ("metrics.jsonl", "tracking.json", "model", "best", "tb")
"""What worker 0 of a training run writes besides checkpoints."""

CHECKPOINT_MANIFEST = "checkpoint.json"
"""Written last: what holds it is whole."""

PARTIAL = ".partial"
"""Ending of the folder of a checkpoint that is being written."""

_NOT_THE_DRIVERS = re.compile(r"checkpoints/step-|(model|best|tb|trials|scores)/|\.")
"""What workers and the trials of a sweep write and read at the URI themselves."""

_NEVER_SENT = ("ray",)
"""What only the machine that wrote it can use."""
_VERSION = ".version"
_SENT_EVERY_S = 10.0
_ASKED_EVERY_S = 5.0
_WORK_DIR_VARIABLE = "EAGLERAY_WORK_DIR"


class TransferError(OSError, ValueError):
    """Files could not be carried to or from the URI of a run; the message names it and the backend's reason."""


class SharedFolder:
    """A run folder that all nodes see under one path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        """Where this process reads and writes the run's files."""
        self.place = str(path)
        """What `run.dir` calls it."""

    @property
    def filesystem(self) -> tuple[Any, str]:
        """Through what pyarrow reads the folder as all nodes see it (none: as any file), and its path there."""
        return None, self.place

    def read_text(self, name: str) -> str:
        """A file as all nodes see it."""
        return (self.path / name).read_text(encoding="utf-8")

    def write_text(self, name: str, text: str) -> None:
        """Write a small file for all nodes to see."""
        (self.path / name).write_text(text, encoding="utf-8")

    def remove(self, name: str) -> None:
        """Remove a file or folder for all nodes; what is not there, or resists, is left."""
        _remove(self.path / name)

    def names(self) -> list[str]:
        """What the folder holds at its top; nothing if there is no such folder."""
        return sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []

    def send(self, *names: str) -> None:
        """Let all nodes see files or folders as this machine has them; one that is gone here is removed."""

    def send_soon(self, name: str) -> None:
        """The same for a file that grows, from a thread, at most every few seconds; a failure is only logged."""

    def freeze(self, *names: str) -> Callable[[], None]:
        """Keep files and folders as they are now; calling the result sends them."""
        return lambda: None

    def receive(self, *names: str) -> None:
        """Replace files and folders of this machine by what was sent; one worker of each node calls this."""

    def send_data(self) -> None:
        """Let all nodes see the prepared examples."""

    def receive_data(self) -> None:
        """The prepared examples, unless this machine has them; one worker of each node calls this."""

    def receive_results(self) -> None:
        """In the driver, when the workers are done: what worker 0 wrote, if it was on another machine."""

    def copy_to(self, name: str, target: Path) -> None:
        """Make a folder of this run available at `target`, a path that is free; it is read there, never written to."""
        target.symlink_to(os.path.relpath((self.path / name).resolve(), target.parent.resolve()), True)

    def begin_writing(self) -> None:
        """In worker 0, before it writes: start from what was sent, whatever an earlier attempt left on this machine."""

    def asked(self, name: str) -> bool:
        """Whether somebody elsewhere made this file; may lag some seconds."""
        return False

    def checkpoints(self) -> list[str]:
        """Folder names of the complete checkpoints, oldest first."""
        folders = (self.path / "checkpoints").glob("step-*")
        return sorted(p.name for p in folders if p.is_dir() and not p.name.endswith(PARTIAL))

    def remove_unfinished_checkpoints(self) -> None:
        """Remove what a run that was killed had half written."""
        for left in (self.path / "checkpoints").glob(f"step-*{PARTIAL}"):
            _remove(left)

    def send_files(self, partial: Path, names: Iterable[str]) -> None:
        """Send some files of the checkpoint that is being written in `partial`."""

    def publish(self, partial: Path) -> None:
        """Make a checkpoint count whose files, the manifest included, have been written and sent."""
        final = partial.with_suffix("")
        shutil.rmtree(final, ignore_errors=True)  # a damaged one that the run fell back from
        partial.rename(final)

    def forget(self, path: Path) -> None:
        """Free the disk of this machine of what others have no use for."""


class RemoteFolder(SharedFolder):
    """A run folder at an fsspec URI.

    Args:
        uri: E.g. `s3://bucket/runs/first`. Credentials and endpoints come from where the backend looks for them.

    Raises:
        ConfigError: The protocol is unknown, or the package of its backend is not installed.
    """

    def __init__(self, uri: str) -> None:
        self.place = uri.rstrip("/")
        try:
            self._fs, root = url_to_fs(self.place)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"The run folder is {uri}, which cannot be used here: {error}. All nodes need the fsspec backend of "
                "that protocol, e.g. `pip install s3fs` for s3:// or gcsfs for gs://."
            ) from None
        self._root = str(root).rstrip("/")
        tail = re.sub(r"[^A-Za-z0-9._-]", "-", self.place.rpartition("/")[2])
        digest = hashlib.sha256(self.place.encode()).hexdigest()[:12]
        # By host, as home folders are often shared between machines.
        self.path = _work_dir() / socket.gethostname() / f"{tail}-{digest}"
        self.path.mkdir(parents=True, exist_ok=True)
        self.copy = f"{socket.gethostname()} {uuid.getnode():x} {self.path}"
        """Which working copy this is, of all machines."""
        self._lock = threading.RLock()  # an older version must never be sent over a newer one
        self._pool: ThreadPoolExecutor | None = None
        self._sending: Future[None] | None = None
        self._sent_at = self._asked_at = float("-inf")
        self._versions: dict[str, tuple[int, int]] = {}

    @property
    def filesystem(self) -> tuple[Any, str]:
        return self._fs, self._root

    def read_text(self, name: str) -> str:
        with self._spoken():
            self._fs.invalidate_cache()
            return self._fs.cat_file(self._at(name)).decode()

    def write_text(self, name: str, text: str) -> None:
        with self._spoken():
            self._make_folder(self._at(name))
            self._fs.pipe_file(self._at(name), text.encode())

    def remove(self, name: str) -> None:
        super().remove(name)
        try:
            self._remove(self._list(name))
        except OSError as error:
            logger.warning("%s/%s could not be removed: %s", self.place, name, error)

    def names(self) -> list[str]:
        with self._spoken():
            self._fs.invalidate_cache()
            try:
                return sorted(PurePosixPath(entry).name for entry in self._fs.ls(self._root, detail=False))
            except FileNotFoundError:
                return []

    def send(self, *names: str) -> None:
        self._send(self.path, names)

    def send_soon(self, name: str) -> None:
        if time.monotonic() < self._sent_at + _SENT_EVERY_S or (self._sending and not self._sending.done()):
            return
        self._sent_at = time.monotonic()
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="send")
        self._sending = self._pool.submit(self._try_to_send, name)

    def freeze(self, *names: str) -> Callable[[], None]:
        frozen = self.path / ".sending"
        _remove(frozen)
        frozen.mkdir()
        versions = {}
        for name in names:
            path = self.path / name
            if path.is_file():
                shutil.copy2(path, frozen / name)
            elif path.is_dir():
                # Folders of models are replaced, never written to; links hold on to the old one.
                version = (path.stat().st_ino, path.stat().st_mtime_ns)
                if self._versions.get(name) == version:
                    continue
                versions[name] = version
                shutil.copytree(path, frozen / name, copy_function=shutil.copy2 if name == "tb" else os.link)
        kept = [name for name in names if (frozen / name).exists()]

        def send() -> None:
            self._send(frozen, kept)
            self._versions |= versions
            _remove(frozen)

        return send

    def receive(self, *names: str) -> None:
        for name in names:
            self._versions.pop(name, None)
            found = self._list(name)
            if found == [name]:
                self._receive_file(name)
            else:
                _remove(self.path / name)
                self._get({file: self.path / file for file in found})

    def _receive_file(self, name: str) -> None:
        """Replace a file as a whole: another process of this machine may be reading it, or asking for it too."""
        whole = self.path / f".receiving-{secrets.token_hex(6)}"
        try:
            self._get({name: whole})
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            whole.replace(self.path / name)
        finally:
            whole.unlink(missing_ok=True)

    def receive_data(self) -> None:
        try:
            if (self.path / "data" / _VERSION).read_text() == self.read_text(f"data/{_VERSION}"):
                return
        except FileNotFoundError:
            pass
        self.receive("data")

    def receive_results(self) -> None:
        if self.read_text(".worker-0") != self.copy:
            self.receive(*WORKERS_PARTS)

    def asked(self, name: str) -> bool:
        if time.monotonic() < self._asked_at + _ASKED_EVERY_S:
            return False
        self._asked_at = time.monotonic()
        try:
            with self._spoken():
                self._fs.invalidate_cache()
                return self._fs.exists(self._at(name))
        except OSError as error:
            logger.warning("%s cannot be asked whether to stop: %s", self.place, error)
            return False

    def checkpoints(self) -> list[str]:
        found = (PurePosixPath(name) for name in self._list("checkpoints"))
        return sorted(path.parts[1] for path in found if path.name == CHECKPOINT_MANIFEST)

    def remove_unfinished_checkpoints(self) -> None:
        super().remove_unfinished_checkpoints()
        whole = set(self.checkpoints())
        found = {name.split("/")[1] for name in self._list("checkpoints/")}
        for name in found - whole:
            self.remove(f"checkpoints/{name}")

    def send_files(self, partial: Path, names: Iterable[str]) -> None:
        folder = f"checkpoints/{partial.with_suffix('').name}"
        self._put([(partial / name, f"{folder}/{name}") for name in names])

    def publish(self, partial: Path) -> None:
        self.send_files(partial, [CHECKPOINT_MANIFEST])

    def forget(self, path: Path) -> None:
        _remove(path)

    # What only run folders and workers of URIs do.

    def probe(self) -> None:
        """Write, read and remove a small file.

        Raises:
            TransferError: The URI cannot be used.
        """
        name, text = f".probe-{secrets.token_hex(6)}", secrets.token_hex(8)
        self.write_text(name, text)
        if self.read_text(name) != text:
            raise TransferError(f"{self.place}: what was written is not what is read")
        self._remove([name])

    def check_out(self) -> None:
        """Replace the working copy of the driver by what the URI holds, but for what others write and need."""
        for entry in self.path.iterdir():
            if entry.name != ".lock":
                _remove(entry)
        self._get({name: self.path / name for name in self._list("") if not _NOT_THE_DRIVERS.match(name)})

    def check_in(self, *, but: Sequence[str] = ()) -> None:
        """Send all of the working copy except what others send."""
        names = {entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")}
        self.send(*sorted(names - {*but, *_NEVER_SENT}))

    def send_data(self) -> None:
        (self.path / "data").mkdir(exist_ok=True)
        (self.path / "data" / _VERSION).write_text(secrets.token_hex(8))
        self.send("data")

    def copy_to(self, name: str, target: Path) -> None:
        # Not by way of the working copy: several runs of one machine may ask for the same at the same time.
        self._get({found: target / PurePosixPath(found).relative_to(name) for found in self._list(name)})

    def begin_writing(self) -> None:
        self.receive(*WORKERS_PARTS, "config.yaml", "stop")
        self.write_text(".worker-0", self.copy)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _try_to_send(self, name: str) -> None:
        try:
            self.send(name)
        except OSError as error:
            logger.warning("%s could not be sent to %s: %s", name, self.place, error)

    def _send(self, base: Path, names: Iterable[str]) -> None:
        for name in names:
            path = base / name
            if path.is_dir():
                self._send_folder(base, name)
            elif path.is_file():
                self._put([(path, name)])
            else:
                self._remove(self._list(name))

    def _send_folder(self, base: Path, name: str) -> None:
        """JSON files go first and come last: without them nobody takes a half-replaced model for a whole one."""
        files = sorted(p.relative_to(base).as_posix() for p in (base / name).rglob("*") if p.is_file())
        with self._lock:
            old = self._list(name)
            self._remove([file for file in old if file.endswith(".json") or file not in files])
            for last in (False, True):
                self._put([(base / file, file) for file in files if file.endswith(".json") == last])

    def _list(self, name: str) -> list[str]:
        """All files below a name, or the one it names, relative to the run folder."""
        with self._spoken():
            self._fs.invalidate_cache()
            found = self._fs.find(self._at(name))
        return sorted(path[len(self._root) + 1 :] for path in found if not path.endswith("/"))

    def _put(self, files: Sequence[tuple[Path, str]]) -> None:
        if not files:
            return
        targets = [self._at(name) for _, name in files]
        with self._lock, self._spoken():
            for folder in {target.rpartition("/")[0] for target in targets}:
                self._fs.makedirs(folder, exist_ok=True)
            self._fs.put([str(path) for path, _ in files], targets)

    def _get(self, files: Mapping[str, Path]) -> None:
        if not files:
            return
        for folder in {path.parent for path in files.values()}:
            folder.mkdir(parents=True, exist_ok=True)
        with self._spoken():
            self._fs.get([self._at(name) for name in files], [str(path) for path in files.values()])

    def _remove(self, names: Sequence[str]) -> None:
        # The manifest of a checkpoint first: what is half removed must not be taken for whole.
        for first in (True, False):
            paths = [self._at(name) for name in names if name.endswith(CHECKPOINT_MANIFEST) == first]
            if paths:
                with self._spoken():
                    self._fs.rm(paths)

    def _make_folder(self, file: str) -> None:
        self._fs.makedirs(file.rpartition("/")[0], exist_ok=True)

    @contextmanager
    def _spoken(self) -> Iterator[None]:
        """Errors of the backends, which have classes of their own, as one."""
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            raise TransferError(f"{self.place}: {type(error).__name__}: {error}") from error


def is_uri(place: str) -> bool:
    """Whether a run folder is at a URI, e.g. `s3://bucket/run`, and not a path."""
    return "://" in place


def open_folder(place: str) -> SharedFolder:
    """The run folder at a path or URI; errors are those of `RemoteFolder`."""
    return RemoteFolder(place) if is_uri(place) else SharedFolder(Path(place))


def leads_node() -> bool:
    """Whether this training worker is the one of its machine that carries files for all."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _work_dir() -> Path:
    return Path(os.environ.get(_WORK_DIR_VARIABLE) or Path.home() / ".cache" / "eagleray")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
