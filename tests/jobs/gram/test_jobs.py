"""The jobs of GRAM run as shipped: tiny configs, and then evaluation of what they left, with real Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eagleray.jobs.gram import discriminative, evaluate, finetune, pretrain
from eagleray.models.gram.judge import Judge
from eagleray.models.gram.prompts import JudgeTemplate, render_pair
from eagleray.models.gram.synthetic import make_preferences
from eagleray.platform.config import ConfigError, load_config, validate_config

CONFIGS = Path(__file__).parents[3] / "configs" / "gram"


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_stages_then_evaluation(tmp_path: Path) -> None:
    """Stage 1, stage 2 from it with LoRA, the discriminative baseline, and all of them side by side."""
    quick = ["train.max_steps=4", "train.eval_every=2", "data.synthetic={pairs: 40}"]
    stage_1 = pretrain.main(
        load_config(pretrain.Config, CONFIGS / "pretrain_tiny.yaml", [*quick, f"run.dir={tmp_path / 's1'}"])
    )
    start = ["scratch=null", f"model.path={stage_1.path / 'model'}", f"run.dir={tmp_path / 's2'}"]
    stage_2 = finetune.main(
        load_config(finetune.Config, CONFIGS / "finetune_tiny.yaml", [*quick, *start, "lora={rank: 2}"])
    )
    assert {"accuracy", "nll", "ece", "consistency", "slot_a_rate", "margin"} <= stage_2.summary.keys()
    model = stage_2.path / "model"
    assert (model / "adapter_model.safetensors").is_file() and (model / "gram.json").is_file()
    baseline = discriminative.main(
        load_config(
            discriminative.Config,
            CONFIGS / "discriminative_tiny.yaml",
            [*quick, f"run.dir={tmp_path / 'bt'}"],
        )
    )
    pairs = {"sources": [{"path": _write(tmp_path / "test.jsonl", make_preferences(30, 0, split="test"))}]}
    rm_bench = {"id": "1", "prompt": "2+2?", "domain": "chat", "chosen": ["4", "It is 4", "**4**"]}
    rm_bench |= {"rejected": ["5", "It is 5", "**5**"]}
    values = {
        "scorers": {
            "GRAM": {"kind": "judge", "path": str(model)},
            "discriminative": {"kind": "discriminative", "path": str(baseline.path / "model")},
            "bag of words": {"kind": "bag_of_words", "train": pairs, "dev": pairs},
            "longer": {"kind": "longer_answer"},
        },
        "sets": {
            "pairs": {"pairs": pairs},
            "rm-bench": {
                "benchmark": "rmbench",
                "source": {"path": _write(tmp_path / "rm.jsonl", [rm_bench])},
            },
        },
        "run": {"dir": str(tmp_path / "evaluation")},
        "bootstrap": 100,
    }
    report = evaluate.main(validate_config(evaluate.Config, values, "test"))
    figures = report["sets"]["pairs"]["scorers"]
    assert list(figures) == ["GRAM", "discriminative", "bag of words", "longer"]
    for name, scorer in figures.items():
        assert scorer["accuracy"]["low"] <= scorer["accuracy"]["value"] <= scorer["accuracy"]["high"], name
        assert ("difference" in scorer) == (name != "GRAM")
    assert report["sets"]["rm-bench"]["scorers"]["GRAM"]["benchmark"]["benchmark"] == "rmbench"
    assert json.loads((tmp_path / "evaluation" / "report.json").read_text()) == json.loads(json.dumps(report))
    assert len(list((tmp_path / "evaluation" / "plots").glob("*.png"))) == 6
    rows = [
        json.loads(line)
        for line in (tmp_path / "evaluation" / "results" / "pairs.jsonl").read_text().splitlines()
    ]
    judged = Judge.from_pretrained(model).compare(
        [(r["prompt"], r["chosen"], r["rejected"]) for r in rows[:3]]
    )
    for row, comparison in zip(rows[:3], judged, strict=True):
        assert row["GRAM"]["p_a"] == pytest.approx(comparison.p_a, abs=1e-6)


def test_official_files_reach_the_loss(tmp_path: Path) -> None:
    """Rows of the official stage 2 and stage 1 files, through the jobs' own loading."""
    template = JudgeTemplate(name="official-like", instruction="Another wording of the judge's task.")
    rows = [
        {"instruction": template.render(f"question {i}", "good", "bad"), "input": "", "output": "AB"[i % 2]}
        for i in range(40)
    ]
    data = {
        "train": {"sources": [{"path": _write(tmp_path / "s2.jsonl", rows)}]},
        "official": True,
        "eval_fraction": 0.2,
    }
    pairs = finetune.load_labelled(finetune.PairData.model_validate(data), seed=0)
    assert len(pairs.train) + len(pairs.eval) == 40 and len(pairs.eval) > 1
    assert all((p.chosen == "good") == (int(p.prompt_text.split()[1]) % 2 == 0) for p in pairs.train)
    users, assistants = zip(*(render_pair(f"question {i}", "one", "two") for i in range(20)), strict=True)
    rows = [{"instruction": u, "input": "", "output": a} for u, a in zip(users, assistants, strict=True)]
    data["train"] = {"sources": [{"path": _write(tmp_path / "s1.jsonl", rows)}]}
    unlabelled = pretrain.load_unlabelled(finetune.PairData.model_validate(data), seed=0)
    assert {p.response_a for p in unlabelled.train} == {"one"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["judge.template=missing"], r"There is no judge template 'missing'"),
        (["scratch=null"], r"give either `model.path` .* or `scratch`"),
        (["data.synthetic=null"], r"give either `data.train` or `data.synthetic`"),
        (["loss.smothing=0.1"], r"unknown key `loss.smothing`; did you mean `loss.smoothing`\?"),
        (["loss.smoothing=1.5"], r"`loss.smoothing`: Input should be less than 1 \(given: 1.5\)"),
    ],
)
def test_contradictions_are_refused_before_anything_runs(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(finetune.Config, CONFIGS / "finetune_tiny.yaml", overrides)
