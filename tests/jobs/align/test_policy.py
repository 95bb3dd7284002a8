"""Policies trained by a judge and on pairs, with trl in Ray Train workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders import tiny_model, tiny_tokenizer

from eagleray.jobs.align import dpo, policy
from eagleray.jobs.align.training import whole_checkpoint
from eagleray.models.gram.judge import Judge
from eagleray.models.gram.prompts import JudgeEncoder, JudgeTemplate
from eagleray.models.gram.synthetic import make_preferences
from eagleray.platform.config import ConfigError, validate_config
from eagleray.platform.data.sources import DataError, SourceConfig
from eagleray.platform.tracking import read_metrics


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A policy, a judge, and prompts."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    judge = Judge(tiny_model(seed=1), JudgeEncoder(tokenizer, JudgeTemplate.load("short"), max_length=512))
    for folder, weights in ((tmp_path / "policy", model), (tmp_path / "judge", judge.model)):
        weights.save_pretrained(folder)  # type: ignore[operator]
        tokenizer.save_pretrained(folder)
    judge.save_settings(tmp_path / "judge")
    for name, split in (("train", "train"), ("eval", "test")):
        rows = make_preferences(6, 0, split=split)  # type: ignore[arg-type]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        name: str(tmp_path / name) for name in ("policy", "judge", "train.jsonl", "eval.jsonl", "run", "dpo")
    }


def _values(files: dict[str, str], **fields: Any) -> dict[str, Any]:
    train = {"max_steps": 2, "batch_size": 8, "micro_batch_size": 4, "log_every": 1, "eval_every": 1}
    values = {
        "model": {"path": files["policy"]},
        "prompts": {
            "train": [{"path": files["train.jsonl"]}],
            "eval": [{"path": files["eval.jsonl"]}],
            "eval_limit": 2,
        },
        "reward": {"path": files["judge"]},
        "gold": {"kind": "steps_in_order"},
        "generation": {"answers": 4, "max_tokens": 6},
        "train": {**train, "checkpoint_every": 1},
        "optim": {"lr": 1e-3},
        "run": {"dir": files["run"]},
    }
    return {**values, **fields}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_judge_trains_a_policy_and_pairs_train_it_further(files: dict[str, str]) -> None:
    """Two workers, two steps, watched before the first and after each; then DPO from the policy that came out."""
    values = _values(files, ray={"num_workers": 2})
    done = policy.main(validate_config(policy.Config, values, "test"))
    records = read_metrics(done.path / "metrics.jsonl")
    watched = [r for r in records if r["kind"] == "eval"]
    assert [r["step"] for r in watched] == [0, 1, 2]
    expected = {"rewards_gram_mean", "rewards_win_rate_mean", "rewards_gold_mean"}
    assert all(expected <= record.keys() for record in watched)
    trained = [r for r in records if r["kind"] == "train"]
    assert all("rewards_gram_mean" in r and "rewards_gold_mean" not in r for r in trained)
    assert {"gold_start", "gold_best", "gold_best_step", "gold_end"} <= done.summary.keys()
    assert (done.path / "model" / "model.safetensors").is_file()
    rows = (done.path / "data" / "start.jsonl").read_text().splitlines()
    assert len(rows) == 2, "the start policy answered the held-out prompts once"

    pairs = {
        "model": {"path": str(done.path / "model")},
        "data": {"synthetic": {"pairs": 20}},
        "train": {**values["train"], "batch_size": 4, "max_steps": 2},
        "run": {"dir": files["dpo"]},
    }
    summary = dpo.main(validate_config(dpo.Config, pairs, "test")).summary
    assert summary["steps"] == 2 and "rewards_accuracies" in summary


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train": {"batch_size": 6, "micro_batch_size": 4}},
            "`train.batch_size` is 6; it must be a multiple of",
        ),
        ({"generation": {"answers": 3}}, "`generation.answers` is 3; it must divide"),
        (
            {"reward": {"path": "x", "reference": "dataset"}},
            "`reward.reference: dataset` and `prompts.reference`",
        ),
        ({"gold": {"kind": "judge"}}, "`gold.path` belongs to kind judge"),
        ({"ray": {"num_workers": [1, 2]}}, "trl trains with a fixed number of workers"),
    ],
)
def test_settings_that_do_not_fit_are_told(
    change: dict[str, Any], message: str, files: dict[str, str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        validate_config(policy.Config, _values(files, **change), "test")


def test_prompts_of_any_preference_file_each_once_and_none_twice(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}, {"prompt": "a"}, {"prompt": "c"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = [SourceConfig(path=str(path))]
    section = policy.PromptSection(train=source, eval=source)
    found = policy.load_prompts(source, section, without={"c"})
    assert found == [{"request": "a"}, {"request": "b"}]
    with pytest.raises(DataError, match="no prompt is left"):
        policy.load_prompts(source, section, without={"a", "b", "c"})
    with pytest.raises(DataError, match="`answer` is no text"):
        policy.load_prompts(source, section.model_copy(update={"reference": "answer"}), without=set())


def test_over_optimisation_by_hand() -> None:
    golds = {0: 0.2, 10: 0.6, 20: 0.6, 30: 0.4}
    records = [{"kind": "eval", "step": step, "rewards_gold_mean": gold} for step, gold in golds.items()]
    expected = {"gold_start": 0.2, "gold_best": 0.6, "gold_best_step": 10, "gold_end": 0.4}
    assert policy.over_optimisation([*records, {"kind": "train", "step": 31}]) == expected
    assert policy.over_optimisation([{"kind": "eval", "step": 0}]) == {}


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("{}")
    assert whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert whole_checkpoint(tmp_path / "nothing") is None
