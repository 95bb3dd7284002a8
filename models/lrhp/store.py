"""Representations of pairs on disk: a `VectorStore` whose rows also hold the logit, tags and whether text was cut.

One row a pair and order. h is kept as the model gave it; it is normalised in one place, `unit`.

Shapes: N pairs, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eagleray.models.lrhp.representer import ORDERS, Order
from eagleray.models.selection.store import StoreError, VectorStore, listed

_READ = ("id", "source", "tags", "prompt_hash", "u")


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
                f"{len(missing)} of {len(ids)} pairs have no representation: {listed(missing)}. Encode them with "
                "`lrhp.encode` into the same store."
            )
        return np.array([place[name] for name in ids], dtype=np.int64)


def unit(h_ND: np.ndarray) -> np.ndarray:
    """v = h / max(‖h‖, 1e-12)."""
    return h_ND / np.maximum(np.linalg.norm(h_ND, axis=-1, keepdims=True), 1e-12)


class RepresentationStore(VectorStore):
    """A folder of representations of one model; a pair may be there in several orders."""

    KEY: ClassVar[tuple[str, ...]] = ("id", "order")
    SCHEMA: ClassVar[pa.Schema] = pa.schema(
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

    def read(self, order: Order | None = None) -> Representations:
        """All rows in one order, in memory.

        Args:
            order: Which; may be left out if the store holds one only.

        Raises:
            StoreError: There are no such rows, or several orders to choose from.
        """
        held = {o for _, o in self.held()}
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
