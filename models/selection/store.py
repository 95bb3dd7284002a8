"""Vectors on disk: a folder of Parquet shards sorted by id, and `store.json` that names them in order.

All rows are of one model. A shard counts once `store.json` names it, so a write that is cut off leaves nothing behind,
and encoding goes on with what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

INDEX_FILE = "store.json"
VERSION = 1
_SHOWN = 5
_PARTS = (".safetensors", ".json", ".jinja", ".model", ".txt")


class StoreError(ValueError):
    """A store cannot be used as asked; the message says why, with ids."""


def text_hash(*texts: str) -> str:
    """Identity of a prompt, or of a pair, by its text; white space is folded."""
    folded = json.dumps([" ".join(text.split()) for text in texts])
    return hashlib.sha256(folded.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def model_hash(path: str | Path, *settings: str) -> str:
    """A short hash of all that decides a representation: weights (an adapter's base too), tokenizer, settings.

    Args:
        path: Model folder; of a hub name the name itself is hashed.
        settings: Further settings that change a result.
    """
    digest = hashlib.sha256("\0".join(settings).encode())
    folder = Path(path)
    digest.update(b"" if folder.is_dir() else str(path).encode())
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        if file.suffix in _PARTS:
            digest.update(file.name.encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    if (folder / "adapter_config.json").is_file():
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        digest.update(model_hash(adapter["base_model_name_or_path"]).encode())
    return digest.hexdigest()[:16]


class VectorStore:
    """A folder of vectors of one model, one row a key."""

    KEY: ClassVar[tuple[str, ...]] = ("id",)
    """Columns of text that tell rows apart, and that they are sorted by."""
    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [
            ("id", pa.string()),
            ("source", pa.string()),
            ("dim", pa.int32()),
            ("h", pa.list_(pa.float32())),
            ("model_hash", pa.string()),
            ("pair_hash", pa.string()),
        ]
    )

    def __init__(self, folder: str | Path, *, model_hash: str | None = None) -> None:
        """Open a store, or with `model_hash` begin one where there is none.

        Raises:
            StoreError: There is none, it is of another version, or it holds rows of another model.
        """
        self.folder = Path(folder)
        index = self.folder / INDEX_FILE
        if not index.is_file():
            if model_hash is None:
                raise StoreError(
                    f"{folder}: no {INDEX_FILE}; this is no store of representations. `lrhp.encode` and `features` "
                    "make one."
                )
            self._index: dict[str, Any] = {"version": VERSION, "model_hash": model_hash, "files": []}
            return
        self._index = json.loads(index.read_text(encoding="utf-8"))
        if self._index.get("version") != VERSION:
            raise StoreError(f"{index}: version {self._index.get('version')}; this program reads {VERSION}.")
        if model_hash not in (None, self.model_hash):
            raise StoreError(
                f"{folder} holds representations of model {self.model_hash}, and these are of model {model_hash}; "
                "vectors of two models cannot be compared. Give another folder."
            )

    @property
    def model_hash(self) -> str:
        """Hash of the model that all rows are of."""
        return self._index["model_hash"]

    @property
    def files(self) -> list[Path]:
        """Shards, in the order of their keys once `tidy` has run."""
        return [self.folder / name for name in self._index["files"]]

    def held(self) -> dict[tuple[str, ...], str]:
        """Key of each row -> hash of the pair's text."""
        return {
            key: pair
            for file in self.files
            for key, pair in zip(self._keys(file), _column(file, "pair_hash"), strict=True)
        }

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows as one more shard, sorted by key; on return they are there to stay.

        Args:
            rows: All columns but `dim` and `model_hash`; h [D] is an array.

        Raises:
            StoreError: A vector holds NaN or infinity.
        """
        if not rows:
            return
        if bad := [row["id"] for row in rows if not np.isfinite(row["h"]).all()]:
            raise StoreError(f"{len(bad)} representations hold NaN or infinity: {listed(bad)}.")
        known = {
            "dim": [len(row["h"]) for row in rows],
            "h": [np.asarray(row["h"], dtype=np.float32) for row in rows],
            "model_hash": [self.model_hash] * len(rows),
        }
        columns = {name: known.get(name) or [_plain(row[name]) for row in rows] for name in self.SCHEMA.names}
        self._write_index([*self._index["files"], self._write_shard(pa.table(columns, schema=self.SCHEMA))])

    def tidy(self, *, shard_rows: int) -> None:
        """Put the rows of all shards in the order of their keys, if they are not; memory holds a shard's rows.

        Shards that the index does not name, left behind by a writer that was killed, are removed.
        """
        if not self._is_sorted():
            self._sort(shard_rows)
        named = set(self.files)
        for file in self.folder.glob("part-*.parquet"):
            if file not in named:
                file.unlink()

    def _sort(self, shard_rows: int) -> None:
        keys = [
            (key, number, row)
            for number, file in enumerate(self.files)
            for row, key in enumerate(self._keys(file))
        ]
        keys.sort()
        old, new = self.files, []
        for start in range(0, len(keys), shard_rows):
            wanted: dict[int, list[int]] = {}
            for _, number, row in keys[start : start + shard_rows]:
                wanted.setdefault(number, []).append(row)
            parts = [pq.read_table(old[number]).take(rows) for number, rows in wanted.items()]
            new.append(self._write_shard(pa.concat_tables(parts), taken=len(old) + len(new)))
        self._write_index(new)

    def _is_sorted(self) -> bool:
        last: tuple[str, ...] = ("",)
        for file in self.files:
            for key in self._keys(file):
                if key <= last:
                    return False
                last = key
        return True

    def _keys(self, file: Path) -> Iterator[tuple[str, ...]]:
        columns = pq.read_table(file, columns=list(self.KEY)).to_pydict()
        return zip(*(columns[name] for name in self.KEY), strict=True)

    def _write_shard(self, table: pa.Table, *, taken: int | None = None) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        number = len(self._index["files"]) if taken is None else taken
        while (path := self.folder / f"part-{number:06d}.parquet").exists():
            number += 1
        partial = path.with_suffix(".partial")
        pq.write_table(table.sort_by([(name, "ascending") for name in self.KEY]), partial)
        os.replace(partial, path)
        return path.name

    def _write_index(self, files: list[str]) -> None:
        self._index = {**self._index, "files": files}
        partial = self.folder / f"{INDEX_FILE}.partial"
        partial.write_text(json.dumps(self._index, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.folder / INDEX_FILE)


def listed(ids: Sequence[str]) -> str:
    """The first few ids, and how many more there are."""
    return ", ".join(ids[:_SHOWN]) + (f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else "")


def _column(file: Path, name: str) -> list[Any]:
    return pq.read_table(file, columns=[name])[name].to_pylist()


def _plain(value: Any) -> Any:
    """A scalar of NumPy as Python has it."""
    return value.item() if isinstance(value, np.generic) else value
