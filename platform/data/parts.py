"""Large inputs cut into parts: consecutive rows of one file that are worked on as a whole or not at all.

A part of plain JSON lines or Parquet is found again without reading what lies before it. What can't be entered
in the middle (a packed file, one JSON array, a data set of the hub) is one part, however long; a set of many
such files is still many parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from eagleray.platform.data.files import is_packed, open_data
from eagleray.platform.data.sources import (
    DataError,
    Row,
    SourceConfig,
    file_format,
    parquet_row_groups,
    parse_json_line,
    read_parquet,
    read_rows,
    source_files,
)


@dataclass(frozen=True)
class Part:
    """Where the rows of a part are."""

    kind: Literal["lines", "row_groups", "all"]
    source: SourceConfig
    """One file, or for `all` whatever is read from start to end."""
    begin: int = 0
    """First byte of JSON lines, or first row group of Parquet."""
    end: int = 0
    """Byte or row group after the last."""
    first: int = 1
    """Number of the first line or row in its file."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which `from_json` makes the part again."""
        return {**asdict(self), "source": self.source.model_dump(mode="json")}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Part:
        """The part that `to_json` described."""
        return Part(**{**values, "source": SourceConfig(**values["source"])})


def cut_into_parts(source: SourceConfig, rows: int) -> Iterator[Part]:
    """The parts of a source in the order of its rows; the same files and `rows` give the same parts.

    Args:
        source: A source whose paths are absolute.
        rows: Rows of a part. The last one of a file has fewer; Parquet is cut between row groups only.

    Raises:
        DataError: The source does not exist or cannot be read.
    """
    files = source_files(source)
    if files is None or source.limit is not None:
        yield Part("all", source)
        return
    for file in files:
        one = source.model_copy(update={"path": str(file)})
        kind = file_format(file, source)
        if kind == "parquet":
            yield from _cut_row_groups(one, file, rows)
        elif kind == "jsonl" and not is_packed(file):
            yield from _cut_lines(one, file, rows)
        else:
            yield Part("all", one)


def read_part(part: Part) -> Iterator[Row | DataError]:
    """The rows of a part, one at a time, as `read_rows` gives them."""
    file = Path(part.source.path)
    if part.kind == "all":
        yield from read_rows(part.source)
    elif part.kind == "row_groups":
        yield from read_parquet(file, groups=range(part.begin, part.end), first=part.first)
    else:
        with open_data(file) as stream:
            stream.seek(part.begin)
            number = part.first
            while stream.tell() < part.end:
                line = stream.readline()
                if not line.isspace():
                    yield parse_json_line(line, file, number)
                number += 1


def _cut_lines(source: SourceConfig, file: Path, rows: int) -> Iterator[Part]:
    begin, first = 0, 1
    position, number = 0, 0
    with open_data(file) as stream:
        for line in stream:
            position += len(line)
            number += 1
            if number == first + rows - 1:
                yield Part("lines", source, begin, position, first)
                begin, first = position, number + 1
    if begin < position or position == 0:
        # An empty file is a part as well: reading it says that it is empty.
        yield Part("lines" if position else "all", source, begin, position, first)


def _cut_row_groups(source: SourceConfig, file: Path, rows: int) -> Iterator[Part]:
    groups = parquet_row_groups(file)
    begin, first, held = 0, 1, 0
    for group, size in enumerate(groups):
        held += size
        if held >= rows or group == len(groups) - 1:
            yield Part("row_groups", source, begin, group + 1, first)
            begin, first, held = group + 1, first + held, 0
    if not groups:
        yield Part("all", source)
