"""Best-of-n as a job: candidates of files, exact curves, a judge and baselines side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders import tiny_model, tiny_tokenizer

from eagleray.jobs.align import best_of_n
from eagleray.models.gram.judge import Judge
from eagleray.models.gram.prompts import JudgeEncoder, JudgeTemplate
from eagleray.models.gram.synthetic import make_candidates
from eagleray.platform.config import ConfigError, validate_config
from eagleray.platform.data.sources import DataError


def _rows(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": {"path": str(path)}}


def _main(folder: Path, sets: dict[str, Any], scorers: dict[str, Any], **fields: Any) -> dict[str, Any]:
    values = {
        "sets": sets,
        "scorers": scorers,
        "bootstrap": 100,
        "run": {"dir": str(folder / "run")},
        **fields,
    }
    return best_of_n.main(validate_config(best_of_n.Config, values, "test"))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_judge_and_baselines_side_by_side(tmp_path: Path) -> None:
    """The job's figures are those of the library's functions; n = 1 is a random choice for everyone."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    folder = tmp_path / "judge"
    encoder = JudgeEncoder(tokenizer, JudgeTemplate.load("short"), max_length=512)
    judge = Judge(model, encoder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    judge.save_settings(folder)
    rows = make_candidates(3, 4, 0)
    sets = {"made": _rows(tmp_path / "candidates.jsonl", rows)}
    judged = {"kind": "judge", "path": str(folder)}
    scorers = {"GRAM": judged, "longest": {"kind": "longest"}, "first": {"kind": "first"}}
    figures = _main(tmp_path, sets, scorers)["sets"]["made"]
    assert figures["n"] == [1, 2, 4] and figures["prompts"] == 3
    for found in figures["scorers"].values():
        assert found[0]["value"] == pytest.approx(figures["random"][0]["value"])
    qualities = [[c["score"] for c in row["candidates"]] for row in rows]
    assert figures["scorers"]["first"][-1]["value"] == pytest.approx(sum(q[0] for q in qualities) / 3)
    assert figures["oracle"][-1]["value"] == pytest.approx(sum(map(max, qualities)) / 3)
    expected = 0.0
    for row, quality in zip(rows, qualities, strict=True):
        answers = [c["text"] for c in row["candidates"]]
        wins = [
            sum(judge.compare([(row["prompt"], a, b)])[0].p_a for b in answers if b is not a) for a in answers
        ]
        expected += quality[wins.index(max(wins))] / 3
    assert figures["scorers"]["GRAM"][-1]["value"] == pytest.approx(expected)
    assert (tmp_path / "run" / "plots" / "made.png").is_file()


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
