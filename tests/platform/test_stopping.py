"""Signals become a request that workers see; a second one stops the driver at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from eagleray.platform.remote import open_folder
from eagleray.platform.stopping import SignalStop, stop_requested, withdraw_stop


def _send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_function_returns(
    tmp_path: Path, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    folder, before = open_folder(str(tmp_path)), signal.getsignal(number)
    stop = SignalStop(folder)

    def work() -> str:
        threading.Thread(target=_send, args=(number,)).start()
        deadline = time.monotonic() + 10
        while not stop_requested(folder) and time.monotonic() < deadline:
            time.sleep(0.01)
        return "saved"

    assert stop.call(work) == "saved"
    assert stop.received == number and stop_requested(folder)
    assert f"{number.name}: the run saves a checkpoint at its next step and stops" in caplog.text
    withdraw_stop(folder)
    assert not stop_requested(folder) and signal.getsignal(number) == before


def test_the_second_signal_does_not_wait(tmp_path: Path) -> None:
    stop, end = SignalStop(open_folder(str(tmp_path))), threading.Event()

    def hangs() -> None:
        threading.Thread(target=_send, args=(signal.SIGINT, signal.SIGTERM)).start()
        end.wait(60)

    with pytest.raises(KeyboardInterrupt):
        stop.call(hangs)
    assert stop.received == signal.SIGINT
    end.set()


def test_errors_of_the_function_arrive(tmp_path: Path) -> None:
    def fails() -> None:
        raise ValueError("reason")

    with pytest.raises(ValueError, match="reason"):
        SignalStop(open_folder(str(tmp_path))).call(fails)
