"""One driver at a time for a run at a URI, where there are no locks: a file that its holder renews.

A holder that died renews nothing. It is known to be dead at once if it had the same working copy, whose lock is now
ours, and else when the file has not changed for as long as a lease lasts. Only changes are looked at, not
times, so clocks may differ between machines.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from eagleray.platform.remote import RemoteFolder
from eagleray.platform.storage import LockHeldError

logger = logging.getLogger(__name__)

_FILE = ".lease.json"


class Lease:
    """The right to be the driver of a run at a URI.

    Args:
        folder: The run folder, whose working copy this process has locked.
        lasts_s: Seconds without renewal after which a lease is over.
        lost: Called, from a thread, if another driver has taken over, which it does only if this process gave no
            sign of life for as long as a lease lasts. By default the process ends there and then: whatever it
            still wrote would spoil the run of the other.
    """

    def __init__(
        self, folder: RemoteFolder, *, lasts_s: float = 60.0, lost: Callable[[], None] = lambda: os._exit(1)
    ) -> None:
        self._folder, self._lost, self._lasts_s = folder, lost, lasts_s
        self._token = secrets.token_hex(8)
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lease; waits for that of a driver that may be dead.

        Raises:
            LockHeldError: Another driver is alive.
            OSError: The URI cannot be used.
        """
        self._wait_for_the_dead()
        self._renew()
        # Two that found the same dead holder both write; the last one to do so has it.
        time.sleep(min(1.0, self._lasts_s / 10))
        found = self._read()
        if found is None or found["token"] != self._token:
            raise LockHeldError(_told(self._folder.place, found))
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lease back; without effect if it is not held."""
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None
            with contextlib.suppress(OSError):  # then it runs out by itself
                found = self._read()
                if found is not None and found["token"] == self._token:
                    self._folder.remove(_FILE)

    def _wait_for_the_dead(self) -> None:
        first = found = self._read()
        if first is None or first["copy"] == self._folder.copy:
            return
        logger.warning(
            "%s Waiting up to %.0f s for a sign of life.", _told(self._folder.place, first), self._lasts_s
        )
        deadline = time.monotonic() + self._lasts_s
        while time.monotonic() < deadline:
            time.sleep(self._lasts_s / 20)
            found = self._read()
            if found is None:
                return
            if found != first:
                raise LockHeldError(_told(self._folder.place, found))

    def _keep(self) -> None:
        while not self._ended.wait(self._lasts_s / 4):
            try:
                found = self._read()
                if found is not None and found["token"] != self._token:
                    logger.error(
                        "%s It took over while this process gave no sign of life.",
                        _told(self._folder.place, found),
                    )
                    self._lost()
                    return
                self._renew()
            except OSError as error:
                logger.warning("The lease on %s could not be renewed: %s", self._folder.place, error)

    def _renew(self) -> None:
        values = {
            "token": self._token,
            "machine": socket.gethostname(),
            "copy": self._folder.copy,
            "process": os.getpid(),
            "since": self._since,
            "renewed": secrets.token_hex(4),
        }
        self._folder.write_text(_FILE, json.dumps(values))

    def _read(self) -> dict[str, str] | None:
        try:
            return json.loads(self._folder.read_text(_FILE))
        except FileNotFoundError:
            return None
        except ValueError:  # a file system without whole writes, in the middle of one
            time.sleep(0.2)
            return json.loads(self._folder.read_text(_FILE))


def _told(place: str, found: dict[str, str] | None) -> str:
    if found is None:
        return f"{place} is in use by another process."
    return f"{place} is in use by process {found['process']} on {found['machine']} since {found['since']}."
