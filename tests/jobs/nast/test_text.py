"""The job on sentences: parallel files and their faults, batches, and a run with a test set."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from eagleray.jobs.nast import text
from eagleray.jobs.nast.text import ParallelText
from eagleray.platform.config import ConfigError, load_config
from eagleray.platform.data.files import DataError

CONFIG = Path(__file__).parents[3] / "configs" / "nast" / "text_tiny.yaml"
PAIR = ParallelText(source="train.en", target="train.de")


def _write(folder: Path, part: str, source: str, target: str) -> None:
    (folder / f"{part}.en").write_text(source, encoding="utf-8")
    (folder / f"{part}.de").write_text(target, encoding="utf-8")


def test_lines_are_paired_packed_or_plain_and_empty_ones_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write(tmp_path, "train", "one\n\n two \n", "eins\nnichts\nzwei\u2028drei\n")
    expected = [("one", "eins"), ("two", "zwei\u2028drei")]
    assert PAIR.pairs(str(tmp_path)) == expected
    assert "1 pairs have an empty side" in caplog.text
    (tmp_path / "train.de").write_bytes(gzip.compress((tmp_path / "train.de").read_bytes()))
    assert PAIR.pairs(str(tmp_path)) == expected


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("a\nb\n", "c\n", "the numbers of lines differ: train.en has 2, train.de has 1"),
        ("a\n", "\n", "no line has text on both sides"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, source: str, target: str, message: str) -> None:
    _write(tmp_path, "train", source, target)
    with pytest.raises(DataError, match=message):
        PAIR.pairs(str(tmp_path))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("vocabulary.joint=false", "`vocabulary.joint` must be true"),
        ("model.heads=5", "`model`: .*`width` is 32; it must be a multiple of"),
        ("lora={}", "`lora` is for language models|`train.average_best` needs"),
    ],
)
def test_contradictions_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(text.Config, CONFIG, [override])


def test_figures_by_how_much_a_sentence_is_turned() -> None:
    """Monotone sentences are translated, turned ones are not."""
    monotone = [(f"a{i} b{i} c{i} d{i}", f"A{i} B{i} C{i} D{i}") for i in range(4)]
    turned = [(f"a{i} b{i} c{i} d{i}", f"D{i} C{i} B{i} A{i}") for i in range(4)]
    single = [(f"{s}{i}", f"{s.upper()}{i}") for i in range(4) for s in "abcd"]
    found = text.figures(monotone + turned + single, [target for _, target in monotone] + ["x"] * 20)
    scores = {row["to"]: (row["count"], row["score"]) for row in found["by_reordering"]}
    assert scores[1.0] == (4, 0.0) and scores[0.0][0] == 20 and scores[0.0][1] > 0
    assert found["exact_match"] == pytest.approx(4 / 24)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_trains_and_translates_the_test_set(tmp_path: Path) -> None:
    source = "".join(f"{a} {b}\n" for a in ("one", "two", "three") for b in ("one", "two", "three"))
    target = "".join(f"{b} {a}\n" for a in ("eins", "zwei", "drei") for b in ("eins", "zwei", "drei"))
    for part in ("train", "dev"):
        _write(tmp_path, part, source, target)
    options = [
        f"data.root={tmp_path}",
        "data.test={source: dev.en, target: dev.de}",
        "tracking.tensorboard=false",
    ]
    options += [
        f"run.dir={tmp_path / 'run'}",
        "train={batch_size: 8, micro_batch_size: 8, max_steps: 4, eval_every: 2}",
    ]
    run = text.main(load_config(text.Config, CONFIG, options))
    assert {"bleu", "exact_match"} <= run.summary.keys()
    report = json.loads((run.path / "test.json").read_text())
    assert (
        report["sentences"] == 9
        and report["bleu"]["low"] <= report["bleu"]["value"] <= report["bleu"]["high"]
    )
    assert "tok:13a" in report["signature"]
    rows = [json.loads(line) for line in (run.path / "test.jsonl").read_text().splitlines()]
    assert [row["source"] for row in rows] == source.splitlines()
    assert [row["text"] for row in rows] == text.translate(run.path / "model", source.splitlines())
    assert [sum(row["count"] for row in report[key]) for key in ("by_length", "by_reordering")] == [9, 9]
    counts = json.loads((run.path / "manifest.json").read_text())["data"]
    assert counts["train"] == {"sentences": 9, "infeasible_targets": 0}
