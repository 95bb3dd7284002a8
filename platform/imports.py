"""Faster imports of large libraries."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


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
