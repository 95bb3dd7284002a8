"""Batch inference with Ray Data: order, columns, more workers than batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from eagleray.platform.cluster import PlacementError
from eagleray.platform.scoring import map_with_model, map_with_models
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


@pytest.mark.usefixtures("ray_cluster")
def test_models_take_turns_in_the_same_workers() -> None:
    """Models have rows of their own; two names of one model load it once; batches may hold rows of two models."""
    models = {"double": {"factor": 2.0}, "again": {"factor": 2.0}, "triple": {"factor": 3.0}}
    rows = {
        "double": [{"number": i, "text": ""} for i in range(7)],
        "again": [{"number": i, "text": ""} for i in range(2)],
        "triple": [{"number": 10 * i, "text": ""} for i in range(5)],
    }
    found = map_with_models(counting_multiplier, models, rows, RaySection(), batch_size=4)
    assert [row["value"] for row in found["double"]] == [2.0 * i for i in range(7)]
    assert [row["value"] for row in found["again"]] == [0.0, 2.0]
    assert [row["value"] for row in found["triple"]] == [30.0 * i for i in range(5)]
    assert list(found) == ["double", "again", "triple"]
    assert [{row["built"] for row in found[name]} for name in found] == [{1}, {1}, {2}]


def counting_multiplier(factor: float) -> Callable[[list[Row]], list[Row]]:
    """Says how many were built in its process."""
    built.append(factor)
    number = len(built)
    return lambda rows: [{"value": factor * row["number"], "built": number} for row in rows]


built: list[float] = []


def test_no_rows_need_no_workers() -> None:
    assert map_with_model(multiplier, {"factor": 2.0}, [], RaySection()) == []
    assert map_with_models(multiplier, {}, {}, RaySection()) == {}


@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_cannot_be_placed_are_refused() -> None:
    with pytest.raises(PlacementError, match=r"needs 9 worker\(s\)"):
        map_with_model(multiplier, {"factor": 1.0}, [{"number": 1, "text": ""}], RaySection(num_workers=9))
