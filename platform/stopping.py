"""Stopping a run so that nothing is lost, and going on later.

A file `stop` in the run folder asks for it, whoever makes it: the driver on Ctrl-C or a termination signal, or a
person with `touch`, from any machine that sees the folder. Worker 0 looks for the file before every step; all
workers then save a checkpoint at the same step and return. The driver of the next attempt removes the file.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import FrameType
from typing import TypeVar

from eagleray.platform.remote import SharedFolder

logger = logging.getLogger(__name__)

T = TypeVar("T")

_STOP_FILE = "stop"


def request_stop(run_dir: Path) -> None:
    """Ask the run in this folder to stop at its next step, after a checkpoint."""
    (run_dir / _STOP_FILE).touch()


def stop_requested(folder: SharedFolder) -> bool:
    """Whether the run in this folder was asked to stop; at a URI, some seconds ago."""
    return (folder.path / _STOP_FILE).exists() or folder.asked(_STOP_FILE)


def withdraw_stop(folder: SharedFolder) -> None:
    """Forget the request that an earlier attempt followed."""
    folder.remove(_STOP_FILE)


class SignalStop:
    """Turns the first SIGINT or SIGTERM into a request to stop, and a second one into `KeyboardInterrupt`."""

    def __init__(self, folder: SharedFolder) -> None:
        self._folder = folder
        self.received: signal.Signals | None = None
        """The first signal, if there was one."""

    def call(self, function: Callable[[], T]) -> T:
        """Call `function` in a thread of its own and answer signals meanwhile.

        Ray Train takes over Ctrl-C where it is called from the main thread, and aborts the workers in the middle
        of a step; called from another thread it does not. Where this is not the main thread (in a trial of a
        sweep, which Tune stops) `function` is called as it is.

        Raises:
            KeyboardInterrupt: A second signal came; `function` may still be running.
        """
        if threading.current_thread() is not threading.main_thread():
            return function()
        result: Future[T] = Future()
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._answer) for number in numbers}
        try:
            threading.Thread(target=_call_into, args=(result, function), daemon=True).start()
            return result.result()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _answer(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        request_stop(self._folder.path)
        # Not here, in the middle of whatever was interrupted: sending may take its time.
        threading.Thread(target=self._folder.send_soon, args=(_STOP_FILE,), daemon=True).start()
        logger.warning(
            "%s: the run saves a checkpoint at its next step and stops. Once more: stop at once.",
            self.received.name,
        )


def _call_into(result: Future[T], function: Callable[[], T]) -> None:
    try:
        result.set_result(function())
    except BaseException as error:  # noqa: BLE001 - the main thread raises it
        result.set_exception(error)
