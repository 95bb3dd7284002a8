"""Parts of large inputs: together they are the input, row by row, wherever it is cut."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eagleray.platform.data.parts import Part, cut_into_parts, read_part
from eagleray.platform.data.sources import DataError, Row, SourceConfig, read_rows


def _lines(count: int) -> list[str]:
    """JSON lines of different lengths and scripts, with blank lines and a broken one among them."""
    lines = [json.dumps({"n": i, "text": "ä€😀"[: i % 4] * i}, ensure_ascii=False) for i in range(count)]
    return [*lines[:3], "", "  ", *lines[3:5], '{"n": ', *lines[5:]]


def _through_parts(source: SourceConfig, rows: int) -> tuple[list[Row | DataError], int]:
    parts = [Part.from_json(json.loads(json.dumps(p.to_json()))) for p in cut_into_parts(source, rows)]
    return [row for part in parts for row in read_part(part)], len(parts)


def _same(found: list[Row | DataError], expected: list[Row | DataError]) -> bool:
    return [str(row) for row in found] == [str(row) for row in expected]


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 13, 14, 100])
@pytest.mark.parametrize("end", ["\n", "", "\n\n"])
def test_json_lines(tmp_path: Path, rows: int, end: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(_lines(11)) + end, encoding="utf-8")
    source = SourceConfig(path=str(file))
    found, parts = _through_parts(source, rows)
    expected = list(read_rows(source))
    assert len(expected) == 12 and sum(isinstance(row, DataError) for row in expected) == 1
    assert _same(found, expected)
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert parts == -(-lines // rows)


@pytest.mark.parametrize(("rows", "parts"), [(1, 4), (3, 4), (4, 2), (7, 2), (100, 1)])
def test_parquet_is_cut_between_row_groups(tmp_path: Path, rows: int, parts: int) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"n": list(range(11))}), file, row_group_size=3)
    source = SourceConfig(path=str(file))
    found, count = _through_parts(source, rows)
    assert count == parts
    assert _same(found, list(read_rows(source)))


def test_what_cannot_be_entered_is_one_part(tmp_path: Path) -> None:
    text = "\n".join(_lines(11)) + "\n"
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(text.encode()))  # its name does not say so
    (tmp_path / "array.json").write_text(json.dumps([{"n": 1}, {"n": 2}]))
    (tmp_path / "plain.jsonl").write_text(text, encoding="utf-8")
    source = SourceConfig(path=str(tmp_path))
    found, parts = _through_parts(source, 7)
    assert parts == 1 + 1 + 2
    assert _same(found, list(read_rows(source)))
    limited = source.model_copy(update={"limit": 5})
    assert _through_parts(limited, 2)[1] == 1


def test_an_empty_file_still_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    [problem], parts = _through_parts(SourceConfig(path=str(tmp_path / "empty.jsonl")), 5)
    assert parts == 1 and "the file is empty" in str(problem)
