"""The collector is off while libraries are imported, and as it was afterwards."""

from __future__ import annotations

import gc
import importlib
from types import ModuleType

import pytest

from eagleray.jobs.registry import JOBS, load_job
from eagleray.platform.imports import imports


def test_the_collector_is_off_within_and_as_it_was_afterwards() -> None:
    assert gc.isenabled()
    with imports():
        assert not gc.isenabled()
        with imports():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), imports():
        raise ImportError
    assert gc.isenabled()


def test_jobs_are_imported_so(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []

    def import_module(name: str) -> ModuleType:
        seen.append((name, gc.isenabled()))
        return gc

    monkeypatch.setattr(importlib, "import_module", import_module)
    load_job("select")
    assert seen == [(JOBS["select"], False)] and gc.isenabled()
