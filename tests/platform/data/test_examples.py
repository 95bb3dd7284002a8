"""Prepared examples: written once, memory-mapped, complete or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eagleray.platform.data.examples import Examples, write_examples


def _rows(count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"ü{i}", "input_ids": list(range(i % 7)), "length": i % 7, "score": i / 2}
        for i in range(count)
    ]


def test_round_trip_over_several_batches(tmp_path: Path) -> None:
    rows = _rows(2500)
    assert write_examples(tmp_path / "train.arrow", iter(rows)) == 2500
    examples = Examples(tmp_path / "train.arrow")
    assert len(examples) == 2500
    for i in (0, 1023, 1024, 2499):
        row = examples[i]
        assert row["input_ids"].dtype == np.int32 and row["input_ids"].tolist() == rows[i]["input_ids"]
        assert (row["id"], row["length"], row["score"]) == (
            rows[i]["id"],
            rows[i]["length"],
            rows[i]["score"],
        )
    assert examples.column("length").tolist() == [row["length"] for row in rows]


def test_arrays_of_floats_keep_their_type(tmp_path: Path) -> None:
    features = np.linspace(-1, 1, 6, dtype=np.float16)
    write_examples(tmp_path / "train.arrow", [{"id": "a", "features": features}])
    read = Examples(tmp_path / "train.arrow")[0]["features"]
    assert read.dtype == np.float16 and np.array_equal(read, features)


def test_bytes_come_back_as_they_were(tmp_path: Path) -> None:
    content = bytes(range(256))
    write_examples(tmp_path / "images.arrow", [{"content": content}])
    assert Examples(tmp_path / "images.arrow")[0]["content"] == content


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No example is left for 'train'"):
        write_examples(tmp_path / "train.arrow", [])


def test_interrupted_writing_leaves_no_file(tmp_path: Path) -> None:
    def broken() -> Any:
        yield from _rows(1500)
        raise KeyError("interrupted")

    with pytest.raises(KeyError, match="interrupted"):
        write_examples(tmp_path / "train.arrow", broken())
    assert not (tmp_path / "train.arrow").exists()
