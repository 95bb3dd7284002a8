"""The store: sorted by id, one model, resumable, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from eagleray.models.lrhp.store import RepresentationStore, unit
from eagleray.models.selection.store import StoreError, text_hash


def _row(name: str, *, order: str = "canonical", **changes: Any) -> dict[str, Any]:
    number = sum(map(ord, name))
    row = {
        "id": name,
        "source": "made",
        "tags": ["a", "b"],
        "order": order,
        "h": np.array([number, 1.0, -2.0], dtype=np.float32),
        "u": number / 7,
        "truncated": False,
        "prompt_hash": text_hash(name),
        "pair_hash": text_hash(name, "x", "y"),
    }
    return row | changes


def test_rows_come_back_sorted_whatever_the_order_of_writing(tmp_path: Path) -> None:
    store = RepresentationStore(tmp_path, model_hash="m1")
    store.append([_row("c"), _row("a")])
    store.append([_row("e")])
    store.append([_row("d"), _row("b")])
    assert store.read().ids == ["a", "b", "c", "d", "e"]
    store.tidy(shard_rows=2)
    assert [pq.read_table(file)["id"].to_pylist() for file in store.files] == [["a", "b"], ["c", "d"], ["e"]]
    assert sorted(path.name for path in tmp_path.glob("*.parquet")) == sorted(f.name for f in store.files)
    found = RepresentationStore(tmp_path).read()
    np.testing.assert_array_equal(found.h_ND[:, 0], [97, 98, 99, 100, 101])
    np.testing.assert_allclose(found.u_N, found.h_ND[:, 0] / 7, rtol=1e-6)
    assert found.model_hash == "m1" and found.order == "canonical" and found.tags[0] == ["a", "b"]
    np.testing.assert_allclose(np.linalg.norm(found.v_ND, axis=1), 1, rtol=1e-6)
    before = [(file.name, file.stat().st_mtime_ns) for file in store.files]
    store.tidy(shard_rows=2)
    assert before == [(file.name, file.stat().st_mtime_ns) for file in store.files]


def test_columns_are_those_of_the_specification(tmp_path: Path) -> None:
    store = RepresentationStore(tmp_path, model_hash="m1")
    store.append([_row("a")])
    [file] = store.files
    [row] = pq.read_table(file).to_pylist()
    assert {"id", "source", "order", "dim", "h", "u", "truncated", "model_hash"} <= row.keys()
    assert (row["dim"], row["h"], row["model_hash"]) == (3, [97.0, 1.0, -2.0], "m1")


def test_a_shard_that_the_index_does_not_name_does_not_count(tmp_path: Path) -> None:
    """What a writer leaves behind that was killed between the shard and the index."""
    store = RepresentationStore(tmp_path, model_hash="m1")
    store.append([_row("a")])
    index = (tmp_path / "store.json").read_text()
    store.append([_row("b")])
    (tmp_path / "store.json").write_text(index)
    again = RepresentationStore(tmp_path, model_hash="m1")
    assert again.held() == {("a", "canonical"): text_hash("a", "x", "y")}
    again.append([_row("b"), _row("c")])
    assert again.read().ids == ["a", "b", "c"]
    assert len(list(tmp_path.glob("*.parquet"))) == 3
    again.tidy(shard_rows=10)
    assert sorted(tmp_path.glob("*.parquet")) == sorted(again.files) and len(again.files) == 2


def test_several_orders_live_side_by_side(tmp_path: Path) -> None:
    store = RepresentationStore(tmp_path, model_hash="m1")
    store.append([_row("b"), _row("a")])
    store.append([_row("a", order="diff", h=np.zeros(3, dtype=np.float32))])
    store.tidy(shard_rows=10)
    assert {key for key in store.held() if key[1] == "diff"} == {("a", "diff")}
    assert not store.read("diff").h_ND.any() and store.read("canonical").ids == ["a", "b"]
    with pytest.raises(StoreError, match="holds the orders canonical, diff; say which one"):
        store.read()
    with pytest.raises(StoreError, match="holds no representations in the order 'both'"):
        store.read("both")


def test_rows_of_another_model_and_broken_rows_are_refused(tmp_path: Path) -> None:
    store = RepresentationStore(tmp_path, model_hash="m1")
    with pytest.raises(StoreError, match=r"2 representations hold NaN or infinity: a, b"):
        bad = np.array([np.nan, 0, 0], dtype=np.float32)
        store.append([_row("a", h=bad), _row("b", h=bad), _row("c")])
    store.append([_row("a")])
    with pytest.raises(StoreError, match="of model m1, and these are of model m2"):
        RepresentationStore(tmp_path, model_hash="m2")
    with pytest.raises(StoreError, match="this is no store of representations"):
        RepresentationStore(tmp_path / "none")
    with pytest.raises(StoreError, match="1 of 2 pairs have no representation: z"):
        store.read().rows_of(["a", "z"])
    values = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps(values | {"version": 9}))
    with pytest.raises(StoreError, match="version 9"):
        RepresentationStore(tmp_path)


def test_zero_has_a_unit_vector_and_white_space_is_folded() -> None:
    assert not unit(np.zeros((1, 3), dtype=np.float32)).any()
    assert text_hash("a  b\n") == text_hash("a b") != text_hash("a", "b")
