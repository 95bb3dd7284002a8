"""Preparation of pairs (spec 4), check 18 as far as training goes, and labels of margins in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eagleray.jobs.gram.discriminative import with_margins
from eagleray.jobs.lrhp.data import (
    LoadedPairs,
    PairSet,
    TrainingPairs,
    deduplicated,
    named_pairs,
)
from eagleray.models.lrhp.synthetic import BANNED, MAX_GAP, make_typed_pairs
from eagleray.platform.data.margins import read_margins
from eagleray.platform.data.preferences import Preference
from eagleray.platform.data.sources import DataError, SourceConfig


def _pair(name: str, prompt: str, chosen: str, rejected: str, **extra: Any) -> Preference:
    return Preference(name, [{"role": "user", "content": prompt}], chosen, rejected, None, extra)


def _file(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"sources": [{"path": str(path)}]}


def test_repetitions_go_and_contradictions_go_with_their_counterpart() -> None:
    kept, counts = deduplicated(
        [
            _pair("1", "x", "a", "b"),
            _pair("2", "x", "a ", " b"),  # white space is folded
            _pair("3", "x", "a", "c"),
            _pair("4", "y", "a", "b"),
            _pair("5", "y", "b", "a"),
        ]
    )
    assert [pair.id for pair in kept] == ["1", "3"]
    assert counts == {"repeated": 1, "contradictory": 2}


def test_check_18_evaluation_prompts_never_reach_training(tmp_path: Path) -> None:
    train = [{"id": str(i), "prompt": f"p {i}", "chosen": "a", "rejected": "b"} for i in range(4)]
    test = [{"id": "t", "prompt": "p  2 ", "chosen": "c", "rejected": "d"}]
    section = TrainingPairs.model_validate(
        {
            "train": {"pairs": _file(tmp_path / "train.jsonl", train)},
            "eval": {"pairs": _file(tmp_path / "test.jsonl", test)},
        }
    )
    loaded, held_out = section.load(seed=0)
    assert [pair.id for pair in loaded.pairs] == ["0", "1", "3"] and len(held_out) == 1
    assert loaded.counts["left_out"]["prompt is an evaluation prompt"] == 1
    only = section.model_copy(update={"train": section.eval})
    with pytest.raises(ValueError, match="No training pair is left: prompt is an evaluation prompt: 1"):
        only.load(seed=0)


def test_ids_that_two_sets_share_are_refused() -> None:
    sets = {
        name: LoadedPairs([_pair("b", name, "x", "y"), _pair(name, name, "x", "y", source="own")], {}, {})
        for name in ("one", "two")
    }
    with pytest.raises(ValueError, match="1 ids occur in more than one set: b"):
        named_pairs(sets)
    found = named_pairs({"one": sets["one"]})
    assert [(source, pair.id) for source, pair in found] == [("one", "b"), ("own", "one")]


def test_ties_are_labels_of_a_margin_but_not_of_an_order(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": f"b{m}", "margin": m} for m in (0, 2)]
    section = PairSet.model_validate({"pairs": _file(tmp_path / "rows.jsonl", rows)})
    assert len(section.load().pairs) == 1
    assert [pair.margin for pair in section.load(keep_ties=True).pairs] == [0, 2]


def test_generated_pairs_follow_their_rules() -> None:
    rows = make_typed_pairs(60, 0)
    assert rows == make_typed_pairs(60, 0) != make_typed_pairs(60, 1)
    for row in rows:
        sentences = [row[name].count(".") for name in ("chosen", "rejected")]
        gap = row["score_chosen"] - row["score_rejected"]
        assert 0 < gap <= MAX_GAP
        if row["tags"] == ["length"]:
            assert sentences[0] - sentences[1] == gap and BANNED not in row["rejected"]
        else:
            assert sentences[0] == sentences[1] and row["rejected"].count(BANNED) == gap
            assert BANNED not in row["chosen"]
    assert not {row["prompt"] for row in rows} & {
        row["prompt"] for row in make_typed_pairs(60, 0, split="test")
    }


def test_margins_are_joined_by_id_and_missing_ones_are_zero(caplog: pytest.LogCaptureFixture) -> None:
    pairs = [_pair("a", "x", "1", "2"), _pair("b", "x", "1", "3"), _pair("c", "x", "1", "4")]
    found = with_margins(pairs, {"c": 0.75, "a": 0.5, "z": 1.0})
    assert [(pair.id, pair.margin) for pair in found] == [("a", 0.5), ("b", 0.0), ("c", 0.75)]
    assert "1 of 3 training pairs have no margin" in caplog.text
    with pytest.raises(ValueError, match="None of the 1 margins is for a training pair"):
        with_margins(pairs, {"z": 1.0})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a"}], r"file\.jsonl:1.*no label of a margin"),
        ([{"id": "a", "margin": 1}, {"id": "a", "margin": 2}], r"file\.jsonl:2.*an id comes twice"),
        ([{"id": "a", "margin": 1, "scale": "x"}, {"id": "b", "margin": 1}], "different scales"),
    ],
)
def test_files_of_margins_that_cannot_be_used(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    _file(tmp_path / "file.jsonl", rows)
    with pytest.raises(DataError, match=message):
        read_margins(SourceConfig(path=str(tmp_path / "file.jsonl")))
