"""Evaluation of visual reward models: best-of-n among the answers about a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rovrm_cases import png

from eagleray.jobs.rovrm import evaluate
from eagleray.platform.config import ConfigError, validate_config

PAIRS = {
    "red.png": [("a longer true one", "false"), ("true", "also false")],
    "blue.png": [("true", "a longer false one"), ("so true", "a false one")],
}


def _config(folder: Path, pictures: dict[str, list[tuple[str, str]]]) -> evaluate.Config:
    rows: list[dict[str, Any]] = [
        {"id": f"{image}-{i}", "prompt": "Fact?", "image": image, "chosen": chosen, "rejected": rejected}
        for image, pairs in pictures.items()
        for i, (chosen, rejected) in enumerate(pairs)
    ]
    for image in pictures:
        (folder / image).write_bytes(png((32, 32), image.removesuffix(".png")))
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "scorers": {"longer answer": {"kind": "longer_answer"}},
        "sets": {"facts": {"sources": [{"path": str(file), "images": str(folder)}], "best_of_n": True}},
        "run": {"dir": str(folder / "run")},
    }
    return validate_config(evaluate.Config, values, "test")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_longest_of_n_answers_about_a_picture(tmp_path: Path) -> None:
    report = evaluate.main(_config(tmp_path, PAIRS))
    curve = report["sets"]["facts"]["scorers"]["longer answer"]["best_of_n"]
    assert [row["n"] for row in curve] == [1, 2, 4]
    # Of four answers the longest is true about one picture and false about the other. Of two, about red: the longest is drawn in 3
    # of 6 pairs, and the two false ones are taken in the other three. About blue, by length: false, false, true, true.
    assert [row["value"] for row in curve] == pytest.approx([0.5, (3 / 6 + 1 / 6) / 2, 0.5])
    assert (curve[-1]["low"], curve[-1]["high"], curve[-1]["oracle"]) == (0, 1, 1)
    assert (tmp_path / "run/plots/facts_best_of_n.png").is_file()
    console = Console(width=200, record=True)
    evaluate.print_table(report, console)
    assert "0.500 (0.000 to 1.000)" in console.export_text()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_too_few_answers_for_a_curve_are_noticed_before_scoring(tmp_path: Path) -> None:
    pictures = {name: pairs[:1] for name, pairs in PAIRS.items()}
    with pytest.raises(ConfigError, match=r"sets\.facts\.best_of_n.*no picture of the set has 4"):
        evaluate.main(_config(tmp_path, pictures))
