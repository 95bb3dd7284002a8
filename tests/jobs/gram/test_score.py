"""Scoring files of any size: equal to the judge in process, and only of the data the run began with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
from builders import tiny_model, tiny_tokenizer

from eagleray.jobs.gram import score
from eagleray.models.gram.judge import Judge
from eagleray.models.gram.synthetic import make_preferences
from eagleray.platform.config import ConfigError, load_config, validate_config
from eagleray.platform.runs import RunFinishedError

CONFIGS = Path(__file__).parents[3] / "configs" / "gram"


def _config(folder: Path, **pairs: Any) -> score.Config:
    values: dict[str, Any] = {
        "scorer": {"kind": "judge", "path": str(folder / "model"), "options": {"template": "short"}},
        "pairs": {"sources": [{"path": str(folder / "pairs.jsonl")}], **pairs},
        "rows_per_part": 10,
        "run": {"dir": f"file://{folder}/run"},
    }
    return validate_config(score.Config, values, "test")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_scores_are_those_of_the_judge(tmp_path: Path) -> None:
    """At a URI, where parts are sent by the workers."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows: list[dict[str, Any]] = list(make_preferences(24, 0, split="test"))
    rows[5] = {"id": "bad", "prompt": "?", "chosen": "same", "rejected": "same"}
    rows[17] = {"id": "unlabelled", "prompt": "Why?", "response_a": "Because.", "response_b": "No idea."}
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    report = score.main(_config(tmp_path, on_error="skip"))

    assert (report["pairs"], report["parts"]) == (23, 3)
    assert report["skipped"] == {"`chosen` and `rejected` are equal": 1}
    found = ds.dataset(tmp_path / "run" / "scores").to_table().to_pylist()
    good = [row for row in rows if row["id"] != "bad"]
    assert [row["id"] for row in found] == [row["id"] for row in good]
    pairs = [
        (row["prompt"], row.get("chosen") or row["response_a"], row.get("rejected") or row["response_b"])
        for row in good
    ]
    judged = Judge.from_pretrained(tmp_path / "model", template="short").compare(pairs)
    for row, verdict in zip(found, judged, strict=True):
        assert row["p_a"] == pytest.approx(verdict.p_a, abs=1e-6)
        assert row["consistent"] == verdict.consistent
    assert report["first_preferred"] == pytest.approx(sum(v.p_a > 0.5 for v in judged) / 23)
    with pytest.raises(RunFinishedError):
        score.main(_config(tmp_path, on_error="skip"))

    # An attempt that was cut short may only go on with the same data.
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    file.write_text(file.read_text() + json.dumps({**rows[0], "id": "new"}) + "\n")
    with pytest.raises(ConfigError, match=r"scores of other data: .*pairs.jsonl changed"):
        score.main(_config(tmp_path, on_error="skip"))


def test_baselines_without_a_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="a scorer of kind longer_answer has no model"):
        load_config(score.Config, CONFIGS / "score_tiny.yaml", ["scorer={kind: longer_answer}"])
