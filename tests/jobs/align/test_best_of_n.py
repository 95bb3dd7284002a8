"""Best-of-n as a job: candidates of files, and what scorers need; `test_sample.py` runs it on sampled answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eagleray.jobs.align import best_of_n
from eagleray.platform.config import ConfigError, validate_config
from eagleray.platform.data.sources import DataError


def _rows(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": {"path": str(path)}}


def test_candidates_of_a_model_can_be_left_out_and_names_of_columns_given(tmp_path: Path) -> None:
    answers = [{"a": "one", "ok": True, "model": "m"}, {"a": "three", "ok": False, "model": "n"}]
    rows = [
        {"q": "?", "them": [*answers, {"a": "ten", "ok": True, "model": "strong"}]},
        {"q": "?", "them": answers[:1]},
    ]
    columns = {"prompt": "q", "candidates": "them", "text": "a", "score": "ok"}
    section = best_of_n.CandidateSet(
        **_rows(tmp_path / "x.jsonl", rows), columns=best_of_n.CandidateColumns(**columns), without=["strong"]
    )
    [group] = best_of_n.load_candidates(section)
    assert group.answers == ["one", "three"] and group.qualities == [1, 0] and group.models == ["m", "n"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "?", "candidates": [{"text": "a"}]},
            "it needs `prompt`, and `candidates` with `text` and `score`",
        ),
        (
            {"prompt": "?", "candidates": [{"text": "a", "score": float("nan")}] * 2},
            "`score` is not a finite number",
        ),
        ({"prompt": "?", "candidates": [{"text": "a", "score": 1}]}, "no prompt is left"),
    ],
)
def test_rows_that_do_not_fit_are_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        best_of_n.load_candidates(best_of_n.CandidateSet(**_rows(tmp_path / "x.jsonl", [row])))


@pytest.mark.parametrize(
    ("scorers", "message"),
    [
        ({"a": {"kind": "judge"}}, "`path` belongs to a scorer of kind judge or discriminative"),
        (
            {"a": {"kind": "longest", "path": "x"}},
            "`path` belongs to a scorer of kind judge or discriminative",
        ),
    ],
)
def test_scorers_have_what_they_need(scorers: dict[str, Any], message: str, tmp_path: Path) -> None:
    sets = {"x": {"source": {"path": "x.jsonl"}}}
    with pytest.raises(ConfigError, match=message):
        validate_config(best_of_n.Config, {"sets": sets, "scorers": scorers}, "test")
    with pytest.raises(ConfigError, match="`reference` is 'b'; it must be one of a"):
        values = {"sets": sets, "scorers": {"a": {"kind": "longest"}}, "reference": "b"}
        validate_config(best_of_n.Config, values, "test")
