"""Batch inference with Ray Data: order, columns, more workers than batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from eagleray.platform.cluster import PlacementError
from eagleray.platform.scoring import map_with_model
from eagleray.platform.sections import RaySection

pytestmark = pytest.mark.ray
Row = dict[str, Any]


def multiplier(factor: float) -> Callable[[list[Row]], list[Row]]:
    def score(rows: list[Row]) -> list[Row]:
        return [{"value": factor * row["number"], "text": row["text"] + "!"} for row in rows]

    return score


@pytest.mark.usefixtures("ray_cluster")
def test_results_come_in_the_order_of_the_rows() -> None:
    rows = [{"number": i, "text": f"row {i}"} for i in range(23)]
    found = map_with_model(multiplier, {"factor": 2.0}, rows, RaySection(num_workers=2), batch_size=5)
    assert found == [{"value": 2.0 * i, "text": f"row {i}!"} for i in range(23)]


def test_no_rows_need_no_workers() -> None:
    assert map_with_model(multiplier, {"factor": 2.0}, [], RaySection()) == []


@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_cannot_be_placed_are_refused() -> None:
    with pytest.raises(PlacementError, match=r"needs 9 worker\(s\)"):
        map_with_model(multiplier, {"factor": 1.0}, [{"number": 1, "text": ""}], RaySection(num_workers=9))
