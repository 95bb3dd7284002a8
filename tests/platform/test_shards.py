"""Batch inference in parts: nothing lost and nothing repeated, whatever dies."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from eagleray.platform.cluster import PlacementError
from eagleray.platform.data.parts import Part, cut_into_parts
from eagleray.platform.data.preferences import ReadReport
from eagleray.platform.data.sources import DataError, Row, SourceConfig
from eagleray.platform.remote import open_folder
from eagleray.platform.sections import RaySection
from eagleray.platform.shards import part_names, process_parts, read_parts

ROWS, ROWS_PER_PART = 50, 7


class Doubler:
    """Doubles a number; leaves out every tenth row; at row 30 it dies or fails, once."""

    schema = pa.schema([("id", pa.string()), ("double", pa.int64())])

    def __init__(self, trouble: str, marker: str) -> None:
        self._trouble, self._marker = trouble, Path(marker)

    def __call__(self, rows: Iterable[Row | DataError], report: ReadReport) -> Iterator[list[dict[str, Any]]]:
        for row in rows:
            assert isinstance(row, Row)
            report.read += 1
            if row.values["n"] == 30 and not self._marker.exists():
                self._marker.touch()
                if self._trouble == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise DataError(row.where, "a row that does not fit")
            if row.values["n"] % 10 == 9:
                report.leave_out("nine")
            else:
                yield [{"id": str(row.values["n"]), "double": 2 * row.values["n"]}]


@pytest.fixture
def parts(tmp_path: Path) -> list[Part]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(ROWS)))
    return list(cut_into_parts(SourceConfig(path=str(file)), ROWS_PER_PART))


def _check_results(place: str, parts: list[Part], report: ReadReport) -> None:
    assert open_folder(place).names() == part_names(len(parts))
    table = read_parts(place, len(parts), Doubler.schema).to_table()
    kept = [n for n in range(ROWS) if n % 10 != 9]
    assert table["id"].to_pylist() == [str(n) for n in kept]
    assert table["double"].to_pylist() == [2 * n for n in kept]
    assert (report.read, report.kept, report.skipped) == (ROWS, len(kept), {"nine": 5})


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_dies_costs_nothing(tmp_path: Path, parts: list[Part]) -> None:
    """At a URI: parts are written on the workers' machines and sent as they are whole."""
    arguments = {"trouble": "dies", "marker": str(tmp_path / "marker")}
    place = f"file://{tmp_path}/out"
    report = process_parts(Doubler, arguments, parts, place, RaySection(num_workers=2))
    assert (tmp_path / "marker").exists()
    _check_results(place, parts, report)
    assert not list(open_folder(place).path.iterdir())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_failed_attempt_goes_on_with_what_is_missing(tmp_path: Path, parts: list[Part]) -> None:
    out, arguments = tmp_path / "out", {"trouble": "fails", "marker": str(tmp_path / "marker")}
    with pytest.raises(Exception, match="a row that does not fit"):
        process_parts(Doubler, arguments, parts, str(out), RaySection())
    before = {file: file.stat().st_mtime_ns for file in out.glob("part-*.parquet")}
    assert 0 < len(before) < len(parts)
    (out / ".part-00007.parquet.host-1.tmp").write_text("half of a part, from a machine that went down")
    report = process_parts(Doubler, arguments, parts, str(out), RaySection())
    _check_results(str(out), parts, report)
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    nothing_to_place = RaySection(num_workers=99)
    _check_results(str(out), parts, process_parts(Doubler, arguments, parts, str(out), nothing_to_place))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_cannot_be_placed_are_refused(tmp_path: Path, parts: list[Part]) -> None:
    with pytest.raises(PlacementError, match=r"needs 99 worker\(s\)"):
        process_parts(Doubler, {}, parts, str(tmp_path / "out"), RaySection(num_workers=99))
