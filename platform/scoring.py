"""Streaming batch inference with Ray Data: rows through a pool of workers that each hold a model."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from eagleray.platform.cluster import check_placement, connected, wants_gpu
from eagleray.platform.imports import packed, unpacked
from eagleray.platform.sections import RaySection

Row = dict[str, Any]
Score = Callable[[list[Row]], Sequence[Row]]

_MODEL = "_model"
"""Key of a row: the name of the model that it is for."""


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


def map_with_models(
    build: Callable[..., Score],
    models: Mapping[str, dict[str, Any]],
    rows: Mapping[str, Sequence[Row]],
    section: RaySection,
    *,
    batch_size: int = 128,
) -> dict[str, list[Row]]:
    """Results of several models, each for rows of its own, in one pass: workers start once and hold one model at a time.

    Args:
        build: As in `stream_with_model`.
        models: Name -> arguments of `build`.
        rows: Name -> rows, with the same keys for all models.
        section: Workers and their resources.
        batch_size: Rows handed over at a time.

    Returns:
        Name -> results in the order of the rows.

    Raises:
        PlacementError: The cluster cannot hold the workers.
    """
    named = [{_MODEL: name, **row} for name in models for row in rows[name]]
    arguments = {"build": build, "models": dict(models)}
    found = iter(map_with_model(_ModelSwitch, arguments, named, section, batch_size=batch_size))
    return {name: [next(found) for _ in rows[name]] for name in models}


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
            fn_constructor_args=(packed((build, arguments)), max(1, int(section.cpus_per_worker))),
            batch_size=batch_size,
            compute=ray.data.ActorPoolStrategy(size=min(section.min_workers, batches)),
            num_cpus=section.cpus_per_worker,
            num_gpus=1 if wants_gpu(section) else 0,
        )
        for row in scored.iter_rows():
            yield row.pop("_index"), row


class _ModelSwitch:
    """Rows to results by the model that each names; two names of one model load it once."""

    def __init__(self, build: Callable[..., Score], models: dict[str, dict[str, Any]]) -> None:
        self._build, self._models = build, models
        self._held: dict[str, Any] | None = None
        self._score: Score | None = None

    def __call__(self, rows: list[Row]) -> list[Row]:
        results: list[Row] = []
        for name, part in groupby(rows, key=lambda row: row[_MODEL]):
            score = self._switch(self._models[name])
            results += score([{key: row[key] for key in row if key != _MODEL} for row in part])
        return results

    def _switch(self, arguments: dict[str, Any]) -> Score:
        if self._score is None or arguments != self._held:
            self._score = None
            gc.collect()  # memory for the next one
            self._score, self._held = self._build(**arguments), arguments
        return self._score


class _Worker:
    """Holds one model; batches come and go as columns."""

    def __init__(self, packed_build: bytes, threads: int) -> None:
        build, arguments = unpacked(packed_build)
        from eagleray.platform.cpu import set_up_torch

        set_up_torch(threads)
        self._score = build(**arguments)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        index = batch.pop("_index")
        results = self._score(
            [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        )
        columns = {name: np.array([result[name] for result in results]) for name in results[0]}
        return {"_index": index, **columns}
