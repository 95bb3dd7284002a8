"""Streaming batch inference with Ray Data: rows through a pool of workers that each hold a model."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from eagleray.platform.cluster import check_placement, connected, wants_gpu
from eagleray.platform.sections import RaySection

Row = dict[str, Any]
Score = Callable[[list[Row]], Sequence[Row]]


def map_with_model(
    build: Callable[..., Score],
    arguments: dict[str, Any],
    rows: Sequence[Row],
    section: RaySection,
    *,
    batch_size: int = 128,
) -> list[Row]:
    """Results of all rows, in their order; arguments and errors are those of `stream_with_model`."""
    found = dict(stream_with_model(build, arguments, rows, section, batch_size=batch_size))
    return [found[index] for index in range(len(rows))]


def stream_with_model(
    build: Callable[..., Score],
    arguments: dict[str, Any],
    rows: Sequence[Row],
    section: RaySection,
    *,
    batch_size: int = 128,
) -> Iterator[tuple[int, Row]]:
    """Results with the number of their row, as `section.min_workers` workers compute them, in any order.

    Args:
        build: Makes the function that turns a batch of rows into as many results; called once in each worker,
            so that a model is loaded once. An importable top-level function or class.
        arguments: Keyword arguments of `build`.
        rows: Rows with the same keys each; values are text, numbers or arrays.
        section: Workers and their resources.
        batch_size: Rows handed over at a time.

    Raises:
        PlacementError: The cluster cannot hold the workers.
    """
    import ray.data

    if not rows:
        return
    with connected(section):
        check_placement(section)
        # Its plan and its hints on idle resources are of no use here; warnings and the bar are.
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
        batches = -(-len(rows) // batch_size)
        numbered = [{"_index": index, **row} for index, row in enumerate(rows)]
        scored = ray.data.from_items(numbered, override_num_blocks=batches).map_batches(
            _Worker,
            fn_constructor_args=(build, arguments, max(1, int(section.cpus_per_worker))),
            batch_size=batch_size,
            compute=ray.data.ActorPoolStrategy(size=min(section.min_workers, batches)),
            num_cpus=section.cpus_per_worker,
            num_gpus=1 if wants_gpu(section) else 0,
        )
        for row in scored.iter_rows():
            yield row.pop("_index"), row


class _Worker:
    """Holds one model; batches come and go as columns."""

    def __init__(self, build: Callable[..., Score], arguments: dict[str, Any], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._score = build(**arguments)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        index = batch.pop("_index")
        results = self._score(
            [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        )
        columns = {name: np.array([result[name] for result in results]) for name in results[0]}
        return {"_index": index, **columns}
