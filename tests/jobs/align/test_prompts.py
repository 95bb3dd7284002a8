"""Prompts of any preference file, with references and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rovrm_cases import BLUE, RED

from eagleray.jobs.align.prompts import PromptColumns, load_prompts
from eagleray.platform.data.sources import DataError, SourceConfig


def _source(path: Path, rows: list[dict[str, Any]]) -> list[SourceConfig]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [SourceConfig(path=str(path))]


def test_each_once_and_none_that_is_held_out(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}, {"prompt": "a"}, {"prompt": "c"}]
    source = _source(tmp_path / "rows.jsonl", rows)
    found = load_prompts(source, PromptColumns(), without={("c", "")})
    assert list(found.values()) == [{"request": "a"}, {"request": "b"}]
    with pytest.raises(DataError, match="no prompt is left"):
        load_prompts(source, PromptColumns(), without={(name, "") for name in "abc"})
    with pytest.raises(DataError, match="`answer` is no text"):
        load_prompts(source, PromptColumns(reference="answer"))


def test_pictures_are_checked_and_copied_once(tmp_path: Path) -> None:
    """One question about two pictures is two prompts; the same picture under two names is one."""
    for name, content in (
        ("red.png", RED),
        ("again.png", RED),
        ("blue.png", BLUE),
        ("bad.png", b"no picture"),
    ):
        (tmp_path / name).write_bytes(content)
    rows = [{"prompt": "?", "image": f"{name}.png"} for name in ("red", "blue", "again")]
    columns, copies = PromptColumns(images=str(tmp_path)), tmp_path / "copies"
    found = load_prompts(_source(tmp_path / "rows.jsonl", rows), columns, pictures=copies)
    assert [Path(row["picture"]).read_bytes() for row in found.values()] == [RED, BLUE]
    assert len(list(copies.iterdir())) == 2
    for row, message in (
        ({"prompt": "?", "image": "bad.png"}, "not a picture"),
        ({"prompt": "?", "image": "none.png"}, "the picture is missing"),
        ({"prompt": "?", "image": "../red.png"}, "leads out of its folder"),
        ({"prompt": "?"}, "the row names no picture"),
    ):
        with pytest.raises(DataError, match=message):
            load_prompts(_source(tmp_path / "one.jsonl", [row]), columns, pictures=copies)
    with pytest.raises(DataError, match="no folder and no zip archive"):
        load_prompts(_source(tmp_path / "one.jsonl", rows), PromptColumns(images=str(tmp_path / "x")))
