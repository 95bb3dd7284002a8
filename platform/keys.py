"""API keys: made once and shown once, kept as hashes in a file, checked in constant time, limited in their rate.

A key is 256 random bits, so that one round of SHA-256 is enough: there is nothing to guess that a slow hash would protect.
The file is read again when it changes, so that keys come and go while a server runs.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

_PREFIX = "er-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class KeyFileError(ValueError):
    """A file of keys that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Key:
    """What is kept of a key."""

    name: str
    """Whose it is; appears in logs."""
    sha256: str
    """Hash of the key."""
    per_minute: int | None
    """Requests a minute, of which as many may come at once; None is no limit."""
    created: str
    """Day on which it was made."""


def add_key(path: Path, name: str, *, per_minute: int | None = None) -> str:
    """Make a key, write its hash into the file and return the key, which cannot be shown again.

    Args:
        path: The file; made if it is missing, readable by its owner only.
        name: Whose key it is.
        per_minute: Most requests a minute, for each replica of the gateway.

    Raises:
        KeyFileError: There is a key with this name, the name cannot be used, or the file cannot be read.
    """
    keys = read_keys(path) if path.exists() else []
    if not _NAME.fullmatch(name):
        raise KeyFileError(
            f"The name {name!r} cannot be used: letters, digits, '.', '_' and '-', at most 63."
        )
    if any(key.name == name for key in keys):
        raise KeyFileError(
            f"{path} has a key with the name {name!r} already; remove it first or choose another."
        )
    secret = _PREFIX + secrets.token_urlsafe(32)
    _write(path, [*keys, Key(name, _hash(secret), per_minute, time.strftime("%Y-%m-%d"))])
    return secret


def remove_key(path: Path, name: str) -> None:
    """Take a key out of the file; running servers refuse it within a second.

    Raises:
        KeyFileError: There is none with this name, or the file cannot be read.
    """
    keys = read_keys(path)
    if all(key.name != name for key in keys):
        names = ", ".join(key.name for key in keys) or "none"
        raise KeyFileError(f"{path} has no key with the name {name!r}; it has: {names}.")
    _write(path, [key for key in keys if key.name != name])


def read_keys(path: Path) -> list[Key]:
    """The keys of a file.

    Raises:
        KeyFileError: It is missing or not a file of keys.
    """
    try:
        return [Key(**values) for values in json.loads(path.read_text(encoding="utf-8"))["keys"]]
    except FileNotFoundError:
        raise KeyFileError(
            f"There is no file {path}. Make a key with `eagleray keys add NAME {path}`."
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise KeyFileError(f"{path} is not a file of keys: {type(error).__name__}.") from None


@dataclass
class _Bucket:
    """As many requests at once as a minute allows, filling up evenly."""

    left: float
    at: float


class KeyChecker:
    """Tells whose a key is and whether its rate allows another request; for one process.

    Args:
        path: The file of keys.
        clock: Seconds of a clock that never goes back.

    Raises:
        KeyFileError: The file cannot be read.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._keys = read_keys(path)
        self._stamp, self._looked = path.stat().st_mtime_ns, clock()
        self._buckets: dict[str, _Bucket] = {}

    def owner(self, secret: str) -> Key | None:
        """The key that this is, or None."""
        self._look()
        given = _hash(secret)
        found = None
        for key in self._keys:  # all of them, so that the time tells nothing
            if hmac.compare_digest(key.sha256, given):
                found = key
        return found

    def wait_s(self, key: Key) -> int:
        """0 if a request is allowed now, and it is counted; else the seconds until one will be."""
        if key.per_minute is None:
            return 0
        now = self._clock()
        bucket = self._buckets.setdefault(key.sha256, _Bucket(key.per_minute, now))
        bucket.left = min(key.per_minute, bucket.left + (now - bucket.at) * key.per_minute / 60)
        bucket.at = now
        if bucket.left < 1:
            return math.ceil((1 - bucket.left) * 60 / key.per_minute)
        bucket.left -= 1
        return 0

    def _look(self) -> None:
        """Read the file again if it has changed. One that cannot be read leaves the keys as they were."""
        if self._clock() - self._looked < 1:
            return
        self._looked = self._clock()
        try:
            stamp = self._path.stat().st_mtime_ns
            if stamp != self._stamp:
                self._keys, self._stamp = read_keys(self._path), stamp
        except (OSError, KeyFileError):
            return


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _write(path: Path, keys: list[Key]) -> None:
    text = json.dumps({"keys": [asdict(key) for key in keys]}, indent=2) + "\n"
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)
