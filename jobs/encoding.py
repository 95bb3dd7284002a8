"""Samples through a model into a store of vectors: what `lrhp.encode` and `features` share.

A streaming Ray Data job that can be stopped and run again: what the store holds already is not computed again, a full
shard is written at once, and a sample whose text has changed is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from eagleray.models.selection.store import StoreError, VectorStore, listed
from eagleray.platform.scoring import Row, Score, stream_with_model
from eagleray.platform.sections import RaySection

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """A sample to encode."""

    columns: dict[str, Any]
    """What the store holds of it besides the model's results; `pair_hash` and the store's key are among them."""
    row: Row
    """What the worker reads; the same keys in every item."""
    length: int
    """Items of like length share batches."""


@dataclass(frozen=True)
class Encoded:
    """What became of the items."""

    computed: int
    left_out: list[str]
    """Ids of those that do not fit into the model."""


def encode(
    store: VectorStore,
    items: Sequence[Item],
    build: Callable[..., Score],
    arguments: dict[str, Any],
    ray: RaySection,
    *,
    shard_rows: int,
    batch_size: int = 256,
) -> Encoded:
    """Compute what the store lacks.

    Args:
        store: Where results go.
        items: Samples; their keys must differ.
        build: Makes a worker's function from rows to results: columns of the store, or `h` None for what does not fit.
        arguments: Of `build`.
        ray: Workers.
        shard_rows: Rows of a shard, which is also what an interruption costs at most.
        batch_size: Rows handed to a worker at a time.

    Raises:
        StoreError: A sample has another text than the row of its key in the store.
    """
    missing = sorted(_missing(store, items), key=lambda item: _key(store, item))
    logger.info("%d samples, %d of them in the store already.", len(items), len(items) - len(missing))
    by_length = sorted(range(len(missing)), key=lambda i: (i // shard_rows, missing[i].length))
    rows = [missing[i].row for i in by_length]
    shards: dict[int, list[dict[str, Any] | None]] = {}
    left_out: list[str] = []
    for place, found in stream_with_model(build, arguments, rows, ray, batch_size=batch_size):
        index = by_length[place]
        number = index // shard_rows
        shard = shards.setdefault(number, [])
        fits = found.pop("fits", True)
        if not fits:
            left_out.append(missing[index].columns["id"])
        shard.append({**missing[index].columns, **found} if fits else None)
        if len(shard) == min(shard_rows, len(missing) - number * shard_rows):
            store.append([row for row in shards.pop(number) if row is not None])
    store.tidy(shard_rows=shard_rows)
    if left_out:
        logger.warning("Left out %d sample(s) that do not fit: %s.", len(left_out), listed(sorted(left_out)))
    return Encoded(len(missing) - len(left_out), sorted(left_out))


def _missing(store: VectorStore, items: Sequence[Item]) -> list[Item]:
    held = store.held()
    changed = [
        item.columns["id"]
        for item in items
        if held.get(_key(store, item), item.columns["pair_hash"]) != item.columns["pair_hash"]
    ]
    if changed:
        raise StoreError(
            f"{len(changed)} pairs have another text than the pair of their id in {store.folder}: "
            f"{listed(changed)}. Give them other ids, or encode into another store."
        )
    return [item for item in items if _key(store, item) not in held]


def _key(store: VectorStore, item: Item) -> tuple[str, ...]:
    return tuple(item.columns[name] for name in store.KEY)
