"""Sampling candidates, and best-of-n among them with a gold score."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_model, tiny_tokenizer

from eagleray.jobs.align import best_of_n, sample
from eagleray.jobs.align.generation import (
    GenerationSection,
    greedy_answers,
    model_text,
    prepare_tokenizer,
    sampled_answers,
)
from eagleray.jobs.align.gold import GoldSection
from eagleray.models.gram.checks import same_last_number
from eagleray.models.gram.judge import Judge
from eagleray.models.gram.prompts import JudgeEncoder, JudgeTemplate
from eagleray.models.gram.synthetic import make_candidates
from eagleray.platform.config import ConfigError, validate_config
from eagleray.platform.data.sources import DataError, Row, SourceConfig, read_rows

SECTION = GenerationSection(answers=3, max_tokens=8)


def test_samples_depend_on_seed_and_text_alone() -> None:
    model, tokenizer = tiny_model(), prepare_tokenizer(tiny_tokenizer())
    torch.manual_seed(1)
    first = sampled_answers(model, tokenizer, "one", SECTION, seed=0)
    state = torch.get_rng_state()
    other = sampled_answers(model, tokenizer, "two", SECTION, seed=0)
    assert torch.equal(state, torch.get_rng_state()), "the global random state stays as it was"
    torch.manual_seed(2)
    assert sampled_answers(model, tokenizer, "one", SECTION, seed=0) == first != other
    assert sampled_answers(model, tokenizer, "one", SECTION, seed=1) != first
    assert len(first) == 3 == len(set(first))


def test_cold_samples_are_the_greedy_answer_and_batches_do_not_change_it() -> None:
    model, tokenizer = tiny_model(), prepare_tokenizer(tiny_tokenizer())
    texts = ["a longer text to go on from", "one", "and another"]
    found = greedy_answers(model, tokenizer, texts, max_tokens=8, batch_size=2)
    alone = [greedy_answers(model, tokenizer, [t], max_tokens=8, batch_size=1)[0] for t in texts]
    assert found == alone
    cold = GenerationSection(answers=2, max_tokens=8, temperature=1e-4)
    assert sampled_answers(model, tokenizer, texts[0], cold, seed=0) == [found[0]] * 2


def test_prompts_as_the_model_reads_them() -> None:
    assert model_text("Why?", "plain", tiny_tokenizer()) == "Why?\n"
    assert model_text("Why?", "chat", tiny_tokenizer()).endswith("Why?<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(ValueError, match="no chat template, which `prompt_format: chat` needs"):
        model_text("Why?", "chat", tiny_tokenizer(chat=False))


def _rows(folder: Path) -> list[dict[str, Any]]:
    found = list(read_rows(SourceConfig(path=str(folder / "candidates"))))
    assert all(isinstance(row, Row) for row in found)
    return [row.values for row in found if isinstance(row, Row)]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_from_prompts_to_curves(tmp_path: Path) -> None:
    """Two workers sample what one would, prompt by prompt; then a judge and baselines choose, and a rule tells how well.

    Beside them a set of known scores, judged in the same pass. All figures are those of the library's functions; n = 1 is a random choice for everyone.
    """
    model, tokenizer = tiny_model(), tiny_tokenizer()
    judge = Judge(model, JudgeEncoder(tokenizer, JudgeTemplate.load("short"), max_length=512))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    judge.save_settings(tmp_path / "model")
    prompts = [{"question": f"What is {i} and {i}?", "answer": f"#### {i % 10}"} for i in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*prompts, prompts[0]]))
    values = {
        "model": {"path": str(tmp_path / "model")},
        "label": "tiny",
        "prompts": {
            "sources": [{"path": str(tmp_path / "prompts.jsonl")}],
            "column": "question",
            "reference": "answer",
        },
        "generation": {"answers": 8, "max_tokens": 12},
        "rows_per_part": 2,
        "ray": {"num_workers": 2},
        "run": {"dir": str(tmp_path / "sampled")},
    }
    cfg = validate_config(sample.Config, values, "test")
    report = sample.main(cfg)
    assert (report["prompts"], report["answers"]) == (5, 40) and report["distinct"] > 0.8
    rows = _rows(tmp_path / "sampled")
    assert [row["prompt"] for row in rows] == [row["question"] for row in prompts], "equal prompts count once"
    assert {c["model"] for row in rows for c in row["candidates"]} == {"tiny"}
    answers = [[c["text"] for c in row["candidates"]] for row in rows]
    asked = model_text(prompts[3]["question"], "chat", tokenizer)
    assert answers[3] == sampled_answers(model, prepare_tokenizer(tokenizer), asked, cfg.generation, seed=0)

    # Parts that are there stay, and the run has its own copy of the prompts.
    assert len(list((tmp_path / "sampled" / "candidates").iterdir())) == 3
    manifest = tmp_path / "sampled" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "status": "interrupted"}))
    (tmp_path / "prompts.jsonl").unlink()
    assert sample.main(cfg) == report

    source = {"path": str(tmp_path / "sampled" / "candidates")}
    made = make_candidates(2, 4, 0)
    (tmp_path / "made.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    choice = {
        "sets": {
            "made": {"source": {"path": str(tmp_path / "made.jsonl")}},
            "sampled": {"source": source, "gold": {"kind": "last_number"}},
        },
        "scorers": {
            "GRAM": {"kind": "judge", "path": str(tmp_path / "model")},
            "longest": {"kind": "longest"},
            "first": {"kind": "first"},
        },
        "bootstrap": 100,
        "run": {"dir": str(tmp_path / "best")},
    }
    sets = best_of_n.main(validate_config(best_of_n.Config, choice, "test"))["sets"]
    assert sets["made"]["n"] == [1, 2, 4] and sets["made"]["prompts"] == 2
    scores = [[c["score"] for c in row["candidates"]] for row in made]
    assert sets["made"]["scorers"]["first"][-1]["value"] == pytest.approx(sum(q[0] for q in scores) / 2)
    figures = sets["sampled"]
    grades = [
        [same_last_number(text, row["reference"]) for text in texts]
        for row, texts in zip(rows, answers, strict=True)
    ]
    assert 0 < sum(map(sum, grades)) < 40, "some answers end with the wanted number by chance"
    assert figures["n"] == [1, 2, 4, 8] and figures["prompts"] == 5
    for found in figures["scorers"].values():
        assert found[0]["value"] == pytest.approx(figures["random"][0]["value"])
    assert figures["random"][0]["value"] == pytest.approx(sum(map(sum, grades)) / 40)
    assert figures["oracle"][-1]["value"] == pytest.approx(sum(map(max, grades)) / 5)
    assert figures["scorers"]["first"][-1]["value"] == pytest.approx(sum(g[0] for g in grades) / 5)
    expected = 0.0
    for row, texts, quality in zip(rows, answers, grades, strict=True):
        places = list(permutations(range(8), 2))
        verdicts = judge.compare([(row["prompt"], texts[i], texts[j]) for i, j in places])
        wins = [sum(v.p_a for (i, _), v in zip(places, verdicts, strict=True) if i == k) for k in range(8)]
        expected += quality[wins.index(max(wins))] / 5
    assert figures["scorers"]["GRAM"][-1]["value"] == pytest.approx(expected)
    assert (tmp_path / "best" / "plots" / "sampled.png").is_file()


def test_gold_scores_need_what_they_compare_with(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    for reference, message in ((None, "`reference` is no text"), ("none", "`reference` holds no number")):
        row = {"prompt": "?", "candidates": [{"text": "1"}, {"text": "2"}], "reference": reference}
        file.write_text(json.dumps(row))
        section = best_of_n.CandidateSet(
            source=SourceConfig(path=str(file)), gold=GoldSection(kind="last_number")
        )
        with pytest.raises(DataError, match=message):
            best_of_n.load_candidates(section)


def test_pictures_are_refused() -> None:
    values = {
        "model": {"path": "x"},
        "prompts": {"sources": [{"path": "x.jsonl"}], "images": "pictures"},
    }
    with pytest.raises(ConfigError, match="answers to prompts with pictures are not sampled here"):
        validate_config(sample.Config, values, "test")
