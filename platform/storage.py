"""Files that a crash, a full disk or a second driver must not spoil: atomic writes, plain JSON, folder locks."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import socket
import time
import weakref
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_LOCKS_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}


class DamagedFileError(ValueError):
    """A file of a run folder that is not what we wrote; the message names it."""


class LockHeldError(ValueError):
    """Another process works in the folder; the message names it."""


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole: a reader sees the old text or the new one, whatever fails in between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a mapping as indented JSON, as a whole; see `plain` for what may be in it."""
    write_text(path, json.dumps(plain(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON mapping; what cannot be parsed is an error that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from None


def plain(value: Any) -> Any:
    """Nested values as JSON can hold them.

    Tensors and arrays become numbers or lists, paths become text, and NaN and infinities become null, because
    strict JSON readers (browsers, jq) refuse a whole file for one of them.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


class FolderLock:
    """An exclusive lock on a folder, held by at most one process.

    The kernel drops the lock when its holder dies in whatever way, so a stale lock needs no guessing about
    process ids: the next `acquire` simply gets it. The file names the holder for the error message only.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / ".lock"
        self._close: weakref.finalize[Any, Any] | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            LockHeldError: Another process has it.
        """
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        close = weakref.finalize(self, os.close, descriptor)
        if not _try_lock(descriptor):
            holder = os.pread(descriptor, 500, 0).decode(errors="replace").strip()
            close()
            raise LockHeldError(f"{self._folder} is in use by {holder or 'another process'}.")
        since = datetime.now(UTC).isoformat(timespec="seconds")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
        self._close = close

    def release(self) -> None:
        """Give the lock back; without effect if it is not held."""
        if self._close is not None:
            self._close()
            self._close = None


def is_locked(folder: Path) -> bool:
    """Whether a living process holds the lock of the folder."""
    try:
        descriptor = os.open(folder / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        # Shared, so that two readers never take each other for the holder.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _try_lock(descriptor: int, *, patience_s: float = 0.5) -> bool:
    """A reader's `is_locked` may hold the file for an instant, hence the patience."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in _LOCKS_UNSUPPORTED:
                raise
            logger.warning("This file system has no locks (%s): start only one driver per run.", error)
            return True
