"""Batch inference over inputs larger than memory: parts in, one Parquet file for each part out.

A part is done once its file stands under its final name, and that is the only record there is: whatever is
killed, and whenever, going on does the parts whose files are missing, so no row is lost or repeated. Workers
hold one chunk of rows at a time.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from eagleray.platform.cluster import check_placement, connected, wants_gpu
from eagleray.platform.data.parts import Part, read_part
from eagleray.platform.data.preferences import ReadReport
from eagleray.platform.data.sources import DataError, Row
from eagleray.platform.imports import packed, unpacked
from eagleray.platform.remote import SharedFolder, open_folder
from eagleray.platform.sections import RaySection

logger = logging.getLogger(__name__)

_COUNTS = b"eagleray.counts"


class PartProcess(Protocol):
    """What a worker does with the rows of a part."""

    schema: pa.Schema
    """Columns of the results."""

    def __call__(
        self, rows: Iterable[Row | DataError], report: ReadReport, /
    ) -> Iterator[list[dict[str, Any]]]:
        """Results, a list at a time, in the order of the rows; rows left out are counted in `report`."""
        ...


def process_parts(
    build: Callable[..., PartProcess],
    arguments: dict[str, Any],
    parts: Sequence[Part],
    place: str,
    section: RaySection,
    *,
    line_every_s: float = 30.0,
) -> ReadReport:
    """Write `part-00000.parquet`, ... into a folder, leaving alone those that are there already.

    Args:
        build: Makes what processes a part; called once in each worker, so that a model is loaded once. An
            importable top-level function or class.
        arguments: Keyword arguments of `build`.
        parts: All parts, always in the same order.
        place: The folder: a path on storage that all workers share, or a URI.
        section: Workers and their resources.
        line_every_s: Least seconds between two lines on progress.

    Returns:
        What became of the rows of all parts, those of earlier attempts included.

    Raises:
        PlacementError: The cluster cannot hold the workers.
        DataError: A row does not fit and the process does not leave such rows out. Finished parts stay.
    """
    import ray.data

    folder = open_folder(place)
    folder.path.mkdir(parents=True, exist_ok=True)
    _clear(folder.path)
    names, there = part_names(len(parts)), set(folder.names())
    missing = [number for number, name in enumerate(names) if name not in there]
    if len(missing) < len(parts):
        logger.info("%d of %d parts are there already.", len(parts) - len(missing), len(parts))
    if missing:
        with connected(section):
            check_placement(section)
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            ray.data.DataContext.get_current().enable_progress_bars = False
            items = [
                {"name": names[number], "part": json.dumps(parts[number].to_json())} for number in missing
            ]
            done = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
                _Worker,
                fn_constructor_args=(packed((build, arguments)), place, max(1, int(section.cpus_per_worker))),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=min(section.min_workers, len(missing))),
                num_cpus=section.cpus_per_worker,
                num_gpus=1 if wants_gpu(section) else 0,
            )
            progress = _Progress(len(missing), line_every_s)
            for row in done.iter_rows():
                progress.part_done(row["kept"])
        _clear(folder.path)
    return _added_up(folder, names)


def part_names(count: int) -> list[str]:
    """Names of the files of the parts, in order."""
    return [f"part-{number:05d}.parquet" for number in range(count)]


def read_parts(place: str, count: int, schema: pa.Schema) -> ds.Dataset:
    """The results of all parts, in order, to be read in batches."""
    filesystem, root = open_folder(place).filesystem
    return ds.dataset([f"{root}/{name}" for name in part_names(count)], schema=schema, filesystem=filesystem)


class _Worker:
    """Holds one model; takes one part at a time."""

    def __init__(self, packed_build: bytes, place: str, threads: int) -> None:
        build, arguments = unpacked(packed_build)
        from eagleray.platform.cpu import set_up_torch

        set_up_torch(threads)
        self._folder = open_folder(place)
        self._process = build(**arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        [name], [part] = batch["name"], batch["part"]
        report = ReadReport()
        chunks = self._process(read_part(Part.from_json(json.loads(part))), report)
        path = self._folder.path / name
        _write(path, self._process.schema, _counted(chunks, report), report)
        self._folder.send(name)
        self._folder.forget(path)
        return {"kept": [report.kept]}


def _counted(chunks: Iterator[list[dict[str, Any]]], report: ReadReport) -> Iterator[list[dict[str, Any]]]:
    for chunk in chunks:
        report.kept += len(chunk)
        yield chunk


def _write(path: Path, schema: pa.Schema, chunks: Iterator[list[dict[str, Any]]], report: ReadReport) -> None:
    # A name of this process: an attempt that was thought dead may still be writing its own.
    unfinished = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}.tmp")
    try:
        with pq.ParquetWriter(unfinished, schema) as writer:
            for chunk in chunks:
                writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
            counts = {"read": report.read, "kept": report.kept, "skipped": report.skipped}
            writer.add_key_value_metadata({_COUNTS: json.dumps(counts).encode()})
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    """Remove what workers that were killed had begun."""
    for unfinished in folder.glob(".part-*.tmp"):
        unfinished.unlink()


def _added_up(folder: SharedFolder, names: Sequence[str]) -> ReadReport:
    total, (filesystem, root) = ReadReport(), folder.filesystem
    for name in names:
        counts = json.loads(pq.read_metadata(f"{root}/{name}", filesystem=filesystem).metadata[_COUNTS])
        total.read += counts["read"]
        total.kept += counts["kept"]
        for reason, count in counts["skipped"].items():
            total.skipped[reason] = total.skipped.get(reason, 0) + count
    return total


class _Progress:
    """Lines with what is done, the rate and the time that is left."""

    def __init__(self, parts: int, line_every_s: float) -> None:
        self._parts, self._line_every_s = parts, 0.0 if sys.stderr.isatty() else line_every_s
        self._started = self._last_line = time.monotonic()
        self._done = self._rows = 0

    def part_done(self, rows: int) -> None:
        self._done += 1
        self._rows += rows
        now = time.monotonic()
        if now - self._last_line < self._line_every_s and self._done < self._parts:
            return
        self._last_line = now
        seconds = now - self._started
        left = seconds / self._done * (self._parts - self._done)
        logger.info(
            "Part %d of %d, %d rows, %.1f rows/s, about %.0f s left.",
            self._done,
            self._parts,
            self._rows,
            self._rows / max(seconds, 1e-9),
            left,
        )
