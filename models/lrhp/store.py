"""Representations on disk: a folder of Parquet shards sorted by id, and `store.json` that names them in order.

One row a pair and order: `id, source, tags, order, dim, h, u, truncated, model_hash, prompt_hash, pair_hash`. All rows
are of one model. A shard counts once `store.json` names it, so a write that is cut off leaves nothing behind, and
encoding goes on with what is missing. h is kept as the model gave it; it is normalised in one place, `unit`.

Shapes: N pairs, D width.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eagleray.models.lrhp.representer import ORDERS, Order

INDEX_FILE = "store.json"
VERSION = 1
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("order", pa.string()),
        ("dim", pa.int32()),
        ("h", pa.list_(pa.float32())),
        ("u", pa.float32()),
        ("truncated", pa.bool_()),
        ("model_hash", pa.string()),
        ("prompt_hash", pa.string()),
        ("pair_hash", pa.string()),
    ]
)
_SHOWN = 5


class StoreError(ValueError):
    """A store cannot be used as asked; the message says why, with ids."""


@dataclass(frozen=True)
class Representations:
    """Rows of a store in one order, sorted by id."""

    ids: list[str]
    sources: list[str]
    tags: list[list[str]]
    prompt_hashes: list[str]
    h_ND: np.ndarray
    """float32."""
    u_N: np.ndarray
    order: Order
    model_hash: str

    @property
    def v_ND(self) -> np.ndarray:
        """h divided by its length."""
        return unit(self.h_ND)

    def rows_of(self, ids: Sequence[str]) -> np.ndarray:
        """Where the given ids are.

        Raises:
            StoreError: Some have no row.
        """
        place = {name: row for row, name in enumerate(self.ids)}
        if missing := [name for name in ids if name not in place]:
            raise StoreError(
                f"{len(missing)} of {len(ids)} pairs have no representation: {_listed(missing)}. Encode them with "
                "`lrhp.encode` into the same store."
            )
        return np.array([place[name] for name in ids], dtype=np.int64)


def unit(h_ND: np.ndarray) -> np.ndarray:
    """v = h / max(‖h‖, 1e-12)."""
    return h_ND / np.maximum(np.linalg.norm(h_ND, axis=-1, keepdims=True), 1e-12)


def text_hash(*texts: str) -> str:
    """Identity of a prompt, or of a pair, by its text; white space is folded."""
    folded = json.dumps([" ".join(text.split()) for text in texts])
    return hashlib.sha256(folded.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class RepresentationStore:
    """A folder of representations of one model."""

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
                    f"{folder}: no {INDEX_FILE}; this is no store of representations. `lrhp.encode` makes one."
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
        """Shards, in the order of their ids once `tidy` has run."""
        return [self.folder / name for name in self._index["files"]]

    def pair_hashes(self, order: Order) -> dict[str, str]:
        """Id -> hash of the pair's text, of the rows in an order."""
        found: dict[str, str] = {}
        for file in self.files:
            columns = pq.read_table(file, columns=["id", "order", "pair_hash"]).to_pydict()
            found |= {
                name: pair
                for name, o, pair in zip(columns["id"], columns["order"], columns["pair_hash"], strict=True)
                if o == order
            }
        return found

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows as one more shard, sorted by id; on return they are there to stay.

        Args:
            rows: All columns but `dim` and `model_hash`; h [D] is an array.
        """
        table = pa.table(
            {
                **{name: [row[name] for row in rows] for name in ("id", "source", "tags", "order")},
                "dim": [len(row["h"]) for row in rows],
                "h": [np.asarray(row["h"], dtype=np.float32) for row in rows],
                "u": [float(row["u"]) for row in rows],
                "truncated": [bool(row["truncated"]) for row in rows],
                "model_hash": [self.model_hash] * len(rows),
                **{name: [row[name] for row in rows] for name in ("prompt_hash", "pair_hash")},
            },
            schema=SCHEMA,
        )
        if bad := [row["id"] for row in rows if not np.isfinite(row["h"]).all()]:
            raise StoreError(f"{len(bad)} representations hold NaN or infinity: {_listed(bad)}.")
        self._write_index([*self._index["files"], self._write_shard(table.sort_by(_SORT))])

    def tidy(self, *, shard_rows: int) -> None:
        """Put the rows of all shards in the order of their ids, if they are not; memory holds a shard's rows.

        Shards that the index does not name, left behind by a writer that was killed, are removed.
        """
        if not self._is_sorted():
            self._sort(shard_rows)
        named = set(self.files)
        for file in self.folder.glob("part-*.parquet"):
            if file not in named:
                file.unlink()

    def read(self, order: Order | None = None) -> Representations:
        """All rows in one order, in memory.

        Args:
            order: Which; may be left out if the store holds one only.

        Raises:
            StoreError: There are no such rows, or several orders to choose from.
        """
        held = {o for file in self.files for _, o in _keys(file)}
        if order is None and len(held) > 1:
            raise StoreError(f"{self.folder} holds the orders {', '.join(sorted(held))}; say which one.")
        chosen: Order | None = order or next((o for o in ORDERS if o in held), None)
        if chosen is None or chosen not in held:
            asked = f" in the order {order!r}" if order else ""
            raise StoreError(f"{self.folder} holds no representations{asked}.")
        columns: dict[str, list[Any]] = {name: [] for name in _READ}
        blocks: list[np.ndarray] = []
        for file in self.files:
            table = pq.read_table(file)
            table = table.filter(pc.field("order") == chosen)
            for name in _READ:
                columns[name] += table[name].to_pylist()
            # Shard by shard: one Arrow list holds 2^31 numbers at most.
            blocks += [
                chunk.flatten().to_numpy().reshape(len(chunk), -1)
                for chunk in table["h"].chunks
                if len(chunk)
            ]
        by_id = np.argsort(np.array(columns["id"]), kind="stable")
        return Representations(
            ids=[columns["id"][i] for i in by_id],
            sources=[columns["source"][i] for i in by_id],
            tags=[columns["tags"][i] for i in by_id],
            prompt_hashes=[columns["prompt_hash"][i] for i in by_id],
            h_ND=np.concatenate(blocks)[by_id],
            u_N=np.array(columns["u"], dtype=np.float32)[by_id],
            order=chosen,
            model_hash=self.model_hash,
        )

    def _sort(self, shard_rows: int) -> None:
        keys = [
            (name, order, number, row)
            for number, file in enumerate(self.files)
            for row, (name, order) in enumerate(_keys(file))
        ]
        keys.sort()
        old, new = self.files, []
        for start in range(0, len(keys), shard_rows):
            wanted: dict[int, list[int]] = {}
            for _, _, number, row in keys[start : start + shard_rows]:
                wanted.setdefault(number, []).append(row)
            parts = [pq.read_table(old[number]).take(rows) for number, rows in wanted.items()]
            new.append(self._write_shard(pa.concat_tables(parts).sort_by(_SORT), taken=len(old) + len(new)))
        self._write_index(new)

    def _is_sorted(self) -> bool:
        last = ("", "")
        for file in self.files:
            for key in _keys(file):
                if key <= last:
                    return False
                last = key
        return True

    def _write_shard(self, table: pa.Table, *, taken: int | None = None) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        number = len(self._index["files"]) if taken is None else taken
        while (path := self.folder / f"part-{number:06d}.parquet").exists():
            number += 1
        partial = path.with_suffix(".partial")
        pq.write_table(table, partial)
        os.replace(partial, path)
        return path.name

    def _write_index(self, files: list[str]) -> None:
        self._index = {**self._index, "files": files}
        partial = self.folder / f"{INDEX_FILE}.partial"
        partial.write_text(json.dumps(self._index, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.folder / INDEX_FILE)


_READ = ("id", "source", "tags", "prompt_hash", "u")
_SORT = [("id", "ascending"), ("order", "ascending")]


def _keys(file: Path) -> Iterator[tuple[str, str]]:
    columns = pq.read_table(file, columns=["id", "order"]).to_pydict()
    return zip(columns["id"], columns["order"], strict=True)


def _listed(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_SHOWN]) + (f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else "")
