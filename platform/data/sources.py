"""Rows of data from JSON lines, JSON arrays, Parquet and the Hugging Face hub, one at a time.

Reading is lazy: memory holds one row of a JSON file or one small batch of a Parquet file, however long the
file. A fault that concerns one row is handed on as a `DataError` in the stream, so that the caller decides
whether to stop or to count it; a fault after which rows would be lost unseen (a damaged archive, an array
that breaks off) is always raised.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import Field

from eagleray.platform.config import Config
from eagleray.platform.data.files import (
    DataError,
    absolute_path,
    decode_utf8,
    find_files,
    not_utf8,
    open_data,
    sha256_of_file,
)

__all__ = [
    "DataError",
    "Row",
    "SourceConfig",
    "content_hash",
    "file_format",
    "file_hashes",
    "parquet_row_groups",
    "parse_json_line",
    "read_parquet",
    "read_rows",
    "resolve_source",
    "source_files",
]

_SUFFIXES: dict[str, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".jsonl.gz"),
    "json": (".json", ".json.gz"),
    "parquet": (".parquet",),
}
_ALL_SUFFIXES = tuple(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_SUFFIXES = (*_ALL_SUFFIXES, ".gz", ".csv", ".tsv", ".txt", ".arrow", ".zip", ".tar")
_SAVED_MARKS = ("state.json", "dataset_dict.json")
_CHUNK = 1 << 20
_PARQUET_BATCH = 128


class SourceConfig(Config):
    """One place that rows come from."""

    path: str = Field(min_length=1)
    """A file, a pattern such as `data/*.jsonl.gz`, a folder (also one of `save_to_disk`), or a hub name."""
    format: Literal["auto", "jsonl", "json", "parquet", "hub"] = "auto"
    """`auto` tells files by their endings and takes `name` or `owner/name` without a local match for the hub."""
    split: str = "train"
    """Split of a hub data set, or of a folder whose file names tell splits apart."""
    name: str | None = None
    """Configuration (subset) of a hub data set."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set."""
    streaming: bool = False
    """Read a hub data set over the network while it is used, instead of downloading it first."""
    limit: int | None = Field(default=None, ge=1)
    """Read only this many rows, from the start."""


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a source and its place: `file:line`, or the number of the row in Parquet and on the hub."""

    values: dict[str, Any]
    where: str


def read_rows(source: SourceConfig) -> Iterator[Row | DataError]:
    """The rows of a source in a fixed order; a row that cannot be read appears as the `DataError` it gives.

    Raises:
        DataError: The source does not exist, or a file is damaged so that the rest of it cannot be read.
    """
    rows = _read_files(source) if _kind(source) == "files" else _read_data_set(source)
    return islice(rows, source.limit)


def resolve_source(source: SourceConfig, base: str | Path) -> SourceConfig:
    """Settle on the driver what a source means, so that a worker in another folder reads the same.

    A local path becomes absolute (seen from `base`) and must exist; a hub name gets `format: hub`.

    Raises:
        DataError: No such file or folder.
    """
    if _kind(source, base) == "hub":
        return source.model_copy(update={"format": "hub"})
    resolved = source.model_copy(update={"path": absolute_path(source.path, base)})
    if _kind(resolved) == "files":
        _local_files(resolved)
    return resolved


def file_hashes(source: SourceConfig) -> dict[str, str]:
    """sha256 of every file of a source by its path; for the hub one entry, from the commit and its files."""
    kind = _kind(source)
    if kind == "hub":
        return {_place(source): _hub_hash(source)}
    if kind == "saved":
        files = sorted(file for file in Path(source.path).expanduser().rglob("*") if file.is_file())
    else:
        files = _local_files(source)
    return {str(file): sha256_of_file(file) for file in files}


def content_hash(source: SourceConfig) -> str:
    """One sha256 for a source: that of its only file, or one over the sums of its files in order."""
    sums = list(file_hashes(source).values())
    return sums[0] if len(sums) == 1 else hashlib.sha256("\n".join(sums).encode()).hexdigest()


def source_files(source: SourceConfig) -> list[Path] | None:
    """The files of a source in the order they are read; `None` if `datasets` reads it.

    Raises:
        DataError: No such file or folder.
    """
    return _local_files(source) if _kind(source) == "files" else None


def _kind(source: SourceConfig, base: str | Path = ".") -> Literal["files", "saved", "hub"]:
    """What reads a source: our readers, or `datasets` for a folder of `save_to_disk` or for the hub.

    With `auto` only `name` or `owner/name` is a hub name, and only where nothing local could be meant: a path
    whose first folder exists, or that ends like a file, is a mistyped path and must not be looked up elsewhere.
    """
    if source.format != "auto":
        return "hub" if source.format == "hub" else "files"
    path = Path(base, Path(source.path).expanduser())
    if any((path / mark).is_file() for mark in _SAVED_MARKS):
        return "saved"
    local = path.exists() or Path(base, Path(source.path).parts[0]).exists()
    named_like_file = source.path.lower().endswith(_FILE_SUFFIXES)
    return "hub" if _HUB_NAME.fullmatch(source.path) and not local and not named_like_file else "files"


def _local_files(source: SourceConfig) -> list[Path]:
    ignored = [key for key in ("name", "revision", "streaming") if getattr(source, key)]
    if ignored:
        reason = f"`{ignored[0]}` is set, which only data sets of the hub have"
        raise DataError(source.path, reason, f"remove `{ignored[0]}`, or set `format: hub`")
    suffixes = _SUFFIXES.get(source.format, _ALL_SUFFIXES)
    try:
        return find_files(source.path, suffixes, split=source.split)
    except DataError as error:
        if not Path(source.path).exists() and _HUB_NAME.fullmatch(source.path):
            hint = f"{error.detail}; if a data set of the hub is meant, set `format: hub`"
            raise DataError(error.where, error.reason, hint) from None
        raise


def _read_files(source: SourceConfig) -> Iterator[Row | DataError]:
    for file in _local_files(source):
        yield from _READERS[file_format(file, source)](file)


def file_format(file: Path, source: SourceConfig) -> str:
    """`jsonl`, `json` or `parquet`, by the source's setting or the file's ending.

    Raises:
        DataError: Neither tells.
    """
    if source.format != "auto":
        return source.format
    for name, suffixes in _SUFFIXES.items():
        if file.name.lower().endswith(suffixes):
            return name
    endings = ", ".join(_ALL_SUFFIXES)
    raise DataError(
        str(file), "the format is not clear from the ending", f"known are {endings}; else set `format`"
    )


def _read_jsonl(path: Path) -> Iterator[Row | DataError]:
    empty = True
    with open_data(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.isspace():
                continue
            empty = False
            yield parse_json_line(line, path, number)
    if empty:
        yield DataError(f"{path}:1", "the file is empty")


def parse_json_line(line: bytes, path: Path, number: int) -> Row | DataError:
    """The object on one line of a file, or what is wrong with it."""
    where = f"{path}:{number}"
    try:
        return _as_row(json.loads(decode_utf8(line, path, line=number).rstrip()), where)
    except DataError as error:
        return error
    except json.JSONDecodeError as error:
        return DataError(where, "broken JSON", f"{error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, endless nesting
        return DataError(where, "broken JSON", str(error))


def _as_row(value: Any, where: str) -> Row | DataError:
    if isinstance(value, dict):
        return Row(value, where)
    return DataError(where, "not a JSON object", f"found {type(value).__name__}, expected {{...}}")


def _read_json(path: Path) -> Iterator[Row | DataError]:
    """A JSON array of objects; a file that starts with an object is read as JSON lines, a common habit."""
    with open_data(path) as stream:
        scanner = _JsonScanner(stream, path)
        start = scanner.peek()
        if start == "":
            yield DataError(f"{path}:1", "the file is empty")
        elif start == "[":
            yield from _read_array(scanner)
        elif start != "{":
            raise scanner.broken(f"starts with {start!r}, expected an array [...] of objects")
    if start == "{":
        yield from _read_jsonl(path)


def _read_array(scanner: _JsonScanner) -> Iterator[Row | DataError]:
    scanner.skip()
    if scanner.peek() == "]":
        yield DataError(scanner.where, "the file is empty", "its array has no elements")
        scanner.skip()
    else:
        separator = ","
        while separator == ",":
            scanner.peek()
            where = scanner.where
            yield _as_row(scanner.value(), where)
            separator = scanner.peek()
            if separator not in (",", "]"):
                raise scanner.broken(
                    "expected ',' or ']' after an element" if separator else "the array is cut off"
                )
            scanner.skip()
    if scanner.peek():
        raise scanner.broken("text after the end of the array")


class _JsonScanner:
    """Walks over a JSON file value by value, with one value and one chunk of the file in memory."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream = stream
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text = ""
        self._position = 0
        self._line = 1
        self._ended = False

    @property
    def where(self) -> str:
        return f"{self._path}:{self._line}"

    def broken(self, detail: str) -> DataError:
        return DataError(self.where, "broken JSON", detail)

    def peek(self) -> str:
        """Skip blanks; the next character, or "" at the end of the file."""
        while True:
            while self._position < len(self._text) and self._text[self._position] in " \t\r\n":
                self.skip()
            if self._position < len(self._text) or not self._read_more():
                return self._text[self._position : self._position + 1]

    def skip(self) -> None:
        self._move_to(self._position + 1)

    def value(self) -> Any:
        """The JSON value that starts here."""
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                # A value that ends outside the text read so far fails in an open string or at the very end.
                cut_off = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - 16
                if cut_off and not self._ended:
                    self._read_more()
                    continue
                self._move_to(error.pos)
                raise self.broken(error.msg) from None
            except (ValueError, RecursionError) as error:
                raise self.broken(str(error)) from None
            if end == len(self._text) and not self._ended:  # a number may go on in the next chunk
                self._read_more()
                continue
            self._move_to(end)
            return value

    def _move_to(self, position: int) -> None:
        self._line += self._text.count("\n", self._position, position)
        self._position = position

    def _read_more(self) -> bool:
        if self._ended:
            return False
        self._text = self._text[self._position :]
        self._position = 0
        # As much as is held already: a value of n characters is tried log(n) times, not n times.
        data = self._stream.read(max(_CHUNK, len(self._text)))
        self._ended = not data
        try:
            self._text += self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            line = self._line + self._text.count("\n") + error.object[: error.start].count(b"\n")
            raise not_utf8(self._path, line, error) from None
        return not self._ended


def read_parquet(
    path: Path, *, groups: Sequence[int] | None = None, first: int = 1
) -> Iterator[Row | DataError]:
    """The rows of a Parquet file, or of some of its row groups, the first of which holds row `first`.

    Raises:
        DataError: The file is damaged.
    """
    number = first - 1
    with _parquet_file(path) as file:
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH, row_groups=groups):
            for values in batch.to_pylist():
                number += 1
                yield Row(values, f"{path}:{number}")
    if number == 0:
        yield DataError(f"{path}:1", "the file is empty", "it has no rows")


def parquet_row_groups(path: Path) -> list[int]:
    """How many rows each row group of a Parquet file has.

    Raises:
        DataError: The file is damaged.
    """
    with _parquet_file(path) as file:
        return [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]


@contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    import pyarrow as pa  # here, as `datasets` below: reading JSON should not wait for them
    import pyarrow.parquet as pq

    try:
        # `pre_buffer` would read the whole file into memory before the first batch.
        with pq.ParquetFile(path, pre_buffer=False) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise DataError(str(path), "not a readable Parquet file", str(error)) from error


_READERS: dict[str, Callable[[Path], Iterator[Row | DataError]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "parquet": read_parquet,
}


def _read_data_set(source: SourceConfig) -> Iterator[Row | DataError]:
    number = 0
    with _data_set_errors(source):
        for values in _open_data_set(source):
            number += 1
            yield Row(dict(values), f"{_place(source)}:{number}")
    if number == 0:
        yield DataError(f"{_place(source)}:1", "the data set is empty")


def _open_data_set(source: SourceConfig) -> Any:
    import datasets

    if _kind(source) == "hub":
        _refuse_local_twin(source)
        return datasets.load_dataset(
            source.path, source.name, split=source.split, revision=source.revision, streaming=source.streaming
        )
    saved = datasets.load_from_disk(str(Path(source.path).expanduser()))
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if source.split not in saved:
        raise DataError(source.path, f"no split {source.split!r}", f"there are {', '.join(map(str, saved))}")
    return saved[source.split]


def _hub_hash(source: SourceConfig) -> str:
    import datasets

    with _data_set_errors(source):
        _refuse_local_twin(source)
        builder = datasets.load_dataset_builder(source.path, source.name, revision=source.revision)
    # The builder's hash is made from the commit and the data files that it resolved to.
    return hashlib.sha256(f"{source.path} {source.name} {source.split} {builder.hash}".encode()).hexdigest()


def _refuse_local_twin(source: SourceConfig) -> None:
    if Path(source.path).exists():  # `datasets` would silently read it in place of the hub
        detail = "it is also a local path; set `format: auto` to read that, or start in another folder"
        raise DataError(source.path, "the hub name is not clear", detail)


@contextmanager
def _data_set_errors(source: SourceConfig) -> Iterator[None]:
    """What `datasets` raises (no network, no such name, split or configuration, broken files) as `DataError`."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, DatasetsError) as error:
        hint = "" if Path(source.path).exists() else "; no local file or folder has this name either"
        raise DataError(_place(source), "the data set cannot be read", f"{error}{hint}") from error


def _place(source: SourceConfig) -> str:
    return f"{source.path}[{source.split}]"
