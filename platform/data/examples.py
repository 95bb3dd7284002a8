"""Prepared examples on disk: one Arrow file, written once by the driver, memory-mapped by every worker.

A run keeps the examples it was started with, so a resumed run reads exactly the same ones, whatever
happened to the source files since.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

_ROWS_PER_BATCH = 1024


class Examples:
    """Random access to the rows of an example file; lists of numbers come as NumPy arrays without a copy."""

    def __init__(self, path: Path) -> None:
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: _value(self._table.column(name)[index]) for name in self._table.column_names}

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, shape (rows,)."""
        return self._table.column(name).to_numpy()


def write_examples(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows (same keys in each; lists are lists of int32, arrays of floats stay what they are) and return how many there are.

    The file appears when it is complete. Memory stays bounded by a batch of rows.

    Raises:
        ValueError: There is no row.
    """
    iterator = iter(rows)
    first = list(islice(iterator, _ROWS_PER_BATCH))
    if not first:
        raise ValueError(f"No example is left for {path.stem!r}; look at the counts of skipped rows above.")
    schema = pa.schema([(name, _type(value)) for name, value in first[0].items()])
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for chunk in _chunks(first, iterator):
            writer.write_batch(pa.RecordBatch.from_pylist(chunk, schema=schema))
            count += len(chunk)
    os.replace(partial, path)
    return count


def _chunks(first: list[dict[str, Any]], rest: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    chunk = first
    while chunk:
        yield chunk
        chunk = list(islice(rest, _ROWS_PER_BATCH))


def _type(value: Any) -> pa.DataType:
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return pa.large_list(pa.from_numpy_dtype(value.dtype))
    if isinstance(value, list | np.ndarray):
        return pa.large_list(pa.int32())
    scalars = {str: pa.large_string(), bytes: pa.large_binary(), int: pa.int64(), float: pa.float64()}
    return scalars[type(value)]


def _value(scalar: Any) -> Any:
    if isinstance(scalar, pa.LargeListScalar):
        return scalar.values.to_numpy()
    return scalar.as_py()
