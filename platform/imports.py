"""Faster imports of large libraries."""

from __future__ import annotations

import contextlib
import gc
import pickle
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Import torch, transformers and the like without the garbage collector.

    They make hundreds of thousands of objects that stay; to search these for garbage as they come takes a sixth of the
    time, in every process of a run.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def packed(thing: Any) -> bytes:
    """What is passed to a process of Ray whose classes and functions are to be imported by `unpacked`.

    Ray would import them itself, with the collector on.
    """
    # Ray takes a second to import, which most who import this module need not wait.
    from ray import cloudpickle

    return cloudpickle.dumps(thing)  # pyright: ignore[reportPrivateImportUsage]


def unpacked(data: bytes) -> Any:
    """What was `packed` by the process that started this one."""
    with imports():
        return pickle.loads(data)
