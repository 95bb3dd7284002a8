"""Stores of vectors: Parquet files with the columns `id` and `h` (a list of numbers), and optionally `source`, `order`
and `model_hash`.

All rows of a store come from one model. Vectors of two models lie in different spaces; comparing them gives numbers
that mean nothing, so it is refused wherever hashes are known.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eagleray.platform.data.files import DataError, find_files, sha256_of_file

_BATCH = 8192
_COLUMNS = ("id", "h", "source", "order", "model_hash")


@dataclass(frozen=True)
class VectorTable:
    """Vectors by id."""

    ids: list[str]
    sources: list[str] | None
    vectors_ND: np.ndarray
    """float32."""
    model_hash: str | None
    hashes: dict[str, str]
    """sha256 of every file, by its path."""


def read_vectors(path: str, *, order: str | None = None, ids_only: bool = False) -> VectorTable:
    """Read a store into memory, at 4 bytes a number.

    Args:
        path: A Parquet file, a pattern, or a folder of such files.
        order: Take only rows with this value in the column `order`, for stores that hold a pair in several orders.
        ids_only: Leave the vectors where they are; those of the table have no numbers, and `h` need not be there.

    Raises:
        DataError: A column or a value is missing, vectors differ in width, an id occurs twice, the rows come from several
            models, or none is left.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = find_files(path, (".parquet",))
    store = _Store(path, order)
    needed = ["id", *([] if ids_only else ["h"]), *(["order"] if order else [])]
    read = [name for name in _COLUMNS if name != "h" or not ids_only]
    try:
        rows = sum(pq.read_metadata(file).num_rows for file in files)
        for file in files:
            # `pre_buffer` would read the whole file into memory before the first batch.
            with pq.ParquetFile(file, pre_buffer=False) as parquet:
                known = parquet.schema_arrow.names
                missing = [name for name in needed if name not in known]
                if missing:
                    raise DataError(
                        str(file), f"`{missing[0]}` is missing", f"the columns are {', '.join(known)}"
                    )
                wanted = [name for name in read if name in known]
                for batch in parquet.iter_batches(batch_size=_BATCH, columns=wanted):
                    store.add(file, batch, rows)
    except (OSError, pa.ArrowException) as error:
        raise DataError(path, "not a readable Parquet file", str(error)) from error
    return store.table({str(file): sha256_of_file(file) for file in files})


class _Store:
    """Rows read so far."""

    def __init__(self, path: str, order: str | None) -> None:
        self._path, self._order = path, order
        self._ids: list[str] = []
        self._sources: list[str] = []
        self._models: set[str] = set()
        self._vectors: np.ndarray | None = None

    def add(self, file: Path, batch: Any, rows: int) -> None:
        import pyarrow.compute

        compute: Any = pyarrow.compute  # its functions are made at import, unseen by type checkers

        if self._order is not None:
            batch = batch.filter(compute.equal(batch.column("order"), self._order))
        if not batch.num_rows:
            return
        columns = {name: batch.column(name) for name in batch.schema.names}
        for name, column in columns.items():
            if column.null_count:
                raise DataError(str(file), f"`{name}` is missing in {column.null_count} row(s)")
        ids = [str(value) for value in columns["id"].to_pylist()]
        if "h" in columns:
            self._add_vectors(file, columns["h"], ids, rows)
        self._ids += ids
        if "source" in columns:
            self._sources += [str(value) for value in columns["source"].to_pylist()]
        if "model_hash" in columns:
            self._models.update(columns["model_hash"].unique().to_pylist())

    def _add_vectors(self, file: Path, column: Any, ids: list[str], rows: int) -> None:
        import pyarrow.compute

        compute: Any = pyarrow.compute
        widths = np.asarray(compute.list_value_length(column))
        width = int(widths[0]) if self._vectors is None else self._vectors.shape[1]
        if (widths != width).any():
            row = int(np.flatnonzero(widths != width)[0])
            detail = f"`{ids[row]}` has {widths[row]} numbers, others have {width}"
            raise DataError(str(file), "vectors of different width", detail)
        if self._vectors is None:
            self._vectors = np.empty((rows, width), dtype=np.float32)
        values = column.flatten().to_numpy(zero_copy_only=False)
        start = len(self._ids)
        self._vectors[start : start + len(ids)] = values.reshape(len(ids), width)

    def table(self, hashes: dict[str, str]) -> VectorTable:
        if not self._ids:
            raise DataError(self._path, "no row is left", f"of order `{self._order}`" if self._order else "")
        if len(self._models) > 1:
            raise DataError(self._path, "vectors of several models", ", ".join(sorted(self._models)))
        if len(set(self._ids)) < len(self._ids):
            seen: set[str] = set()
            twice = next(name for name in self._ids if name in seen or seen.add(name))
            hint = "" if self._order else "; if it has a pair in several orders, choose one by `order`"
            raise DataError(self._path, "an id occurs more than once", f"`{twice}`{hint}")
        return VectorTable(
            self._ids,
            self._sources if len(self._sources) == len(self._ids) else None,
            np.empty((len(self._ids), 0), np.float32)
            if self._vectors is None
            else self._vectors[: len(self._ids)],
            next(iter(self._models), None),
            hashes,
        )
