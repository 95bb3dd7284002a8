"""The collector is off while libraries are imported, and as it was afterwards."""

from __future__ import annotations

import gc
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from eagleray.jobs.registry import JOBS, load_job
from eagleray.platform.imports import imports, packed, unpacked


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


def test_what_was_packed_is_imported_so_where_it_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "arriving.py").write_text(
        "import gc\nenabled = gc.isenabled()\ndef build(): return enabled\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    build = importlib.import_module("arriving").build
    data = packed((build, {"number": 1}))
    monkeypatch.delitem(sys.modules, "arriving")  # as in another process
    arrived, arguments = unpacked(data)
    assert build() and not arrived() and arguments == {"number": 1} and gc.isenabled()
