"""Generated files: what other jobs read, with the truth beside each candidate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eagleray.jobs.gram import generate
from eagleray.jobs.gram.data import PairData, load_labelled
from eagleray.models.gram.synthetic import order_score
from eagleray.platform.config import ConfigError, validate_config


def test_files(tmp_path: Path) -> None:
    values = {"pairs": 20, "held_out": 12, "candidates": 3, "characters": 1000, "run": {"dir": str(tmp_path)}}
    report = generate.main(validate_config(generate.Config, values, "test"))
    expected = {"train": 20, "unlabelled": 20, "dev": 4, "test": 12, "candidates": 12}
    assert report == {f"{name}.jsonl": rows for name, rows in expected.items()} | {"corpus.txt": 1000}
    rows = [json.loads(line) for line in (tmp_path / "candidates.jsonl").read_text().splitlines()]
    assert all(len(row["candidates"]) == 3 for row in rows)
    scores = {c["score"] for row in rows for c in row["candidates"]}
    assert len(scores) > 2 and max(scores) == 1
    assert all(order_score(c["text"]) == c["score"] for row in rows for c in row["candidates"])


def test_fewer_labels_of_a_seed_are_among_more() -> None:
    def ids(limit: int, seed: int = 0) -> list[str]:
        data = validate_config(PairData, {"synthetic": {"pairs": 20}, "limit": limit}, "test")
        return [pair.id for pair in load_labelled(data, seed=seed).train]

    assert ids(12)[:5] == ids(5) and set(ids(5, seed=1)) != set(ids(5))
    with pytest.raises(ConfigError, match=r"`data.limit` is 21; there are 20 training pairs"):
        ids(21)
