"""Policies trained by a judge and on pairs, with trl in Ray Train workers."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from builders import tiny_model, tiny_tokenizer
from rovrm_cases import tiny_llava, tiny_visual_policy
from safetensors.torch import load_file

from eagleray.jobs.align import dpo, policy, training
from eagleray.jobs.align.training import whole_checkpoint
from eagleray.models.gram.judge import Judge
from eagleray.models.gram.prompts import JudgeEncoder, JudgeTemplate
from eagleray.models.gram.synthetic import make_preferences
from eagleray.models.rovrm.checkpoint import save_reward_model
from eagleray.models.rovrm.synthetic import write_visual
from eagleray.platform import launch
from eagleray.platform.config import ConfigError, validate_config
from eagleray.platform.runs import RunFolder, RunInterrupted
from eagleray.platform.stopping import request_stop
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
    names = ("policy", "judge", "train.jsonl", "eval.jsonl", "run", "whole", "dpo")
    return {name: str(tmp_path / name) for name in names}


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


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One worker, here: what a Ray Train worker runs, without Ray."""

    def run_workers(worker: Any, loop: dict[str, Any], section: Any, run: RunFolder) -> dict[str, float]:
        if (summary := worker(loop)) is None:
            raise RunInterrupted(run.path)
        return summary

    monkeypatch.setattr(training, "run_workers", run_workers)
    monkeypatch.setattr(training, "connected", lambda section: nullcontext())
    monkeypatch.setattr(training, "check_placement", lambda section: None)
    monkeypatch.setattr(training, "check_shared_folder", lambda section, folder: None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_judge_trains_a_policy(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Watched before the first step and after each; stopped after the first, with two workers, and going on with one."""
    cfg = validate_config(policy.Config, _values(files, ray={"num_workers": 2}), "test")
    with monkeypatch.context() as patched, pytest.raises(RunInterrupted):
        # The file is there from the beginning: the workers find it at the end of their first step.
        patched.setattr(launch, "withdraw_stop", lambda folder: request_stop(folder.path))
        policy.main(cfg)
    assert whole_checkpoint(Path(files["run"]) / "checkpoints") == f"{files['run']}/checkpoints/checkpoint-1"
    done = policy.main(validate_config(policy.Config, _values(files), "test"))
    records = read_metrics(done.path / "metrics.jsonl")
    watched = [r for r in records if r["kind"] == "eval"]
    assert [r["step"] for r in watched] == [0, 1, 2]
    expected = {"rewards_gram_mean", "rewards_win_rate_mean", "rewards_gold_mean"}
    assert all(expected <= record.keys() for record in watched)
    trained = [r for r in records if r["kind"] == "train"]
    assert all("rewards_gram_mean" in r and "rewards_gold_mean" not in r for r in trained)
    assert {"gold_start", "gold_best", "gold_best_step", "reward_end"} <= done.summary.keys()
    assert (done.path / "plots" / "over_optimisation.png").is_file()
    rows = (done.path / "data" / "start.jsonl").read_text().splitlines()
    assert len(rows) == 2, "the start policy answered the held-out prompts once"


@pytest.mark.usefixtures("in_process")
def test_a_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; each step is a whole pass over the prompts, in an order of its own."""
    values = _values(files, reward={"path": files["judge"], "reference": "start"})
    values["train"] |= {"batch_size": 12, "micro_batch_size": 6, "max_steps": 3}
    values["generation"] = {"answers": 2, "max_tokens": 6}
    cfg = validate_config(policy.Config, values, "test")
    with monkeypatch.context() as patched, pytest.raises(RunInterrupted):
        patched.setattr(training, "stop_requested", lambda folder: True)
        policy.main(cfg)
    resumed = policy.main(cfg)
    whole = policy.main(validate_config(policy.Config, {**values, "run": {"dir": files["whole"]}}, "test"))
    steps = [r["step"] for r in read_metrics(resumed.path / "metrics.jsonl") if r["kind"] == "train"]
    assert steps == [1, 2, 3]
    found, expected = (load_file(at / "model" / "model.safetensors") for at in (resumed.path, whole.path))
    start = load_file(Path(files["policy"]) / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any(torch.equal(found[name], start[name]) for name in expected)
    assert resumed.summary.keys() == whole.summary.keys()
    assert resumed.summary["gold_end"] == whole.summary["gold_end"]


@pytest.mark.usefixtures("in_process")
def test_pairs_train_a_policy(files: dict[str, str]) -> None:
    values = {
        "model": {"path": files["policy"]},
        "data": {"synthetic": {"pairs": 20}},
        "train": {**_values(files)["train"], "batch_size": 4},
        "run": {"dir": files["dpo"]},
    }
    done = dpo.main(validate_config(dpo.Config, values, "test"))
    assert done.summary["steps"] == 2 and "rewards_accuracies" in done.summary
    assert (done.path / "model" / "model.safetensors").is_file()


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
            "`prompts.reference` belongs to `reward.reference: dataset` and to `gold.kind: last_number`",
        ),
        ({"gold": {"kind": "last_number"}}, "`prompts.reference` belongs to"),
        (
            {"reward": {"kind": "rovrm", "path": "x", "reference": "start"}},
            "`reward.reference` and `reward.transform` belong to kind gram",
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": {"path": "x"}}, "with `prompts.images` the reward must be of kind rovrm"),
        ({"gold": {"kind": "judge", "path": "x"}}, "with `prompts.images` the reward must be of kind rovrm"),
        ({"prompt_format": "plain"}, "with `prompts.images` prompts are laid out by the processor"),
    ],
)
def test_pictures_need_what_sees_them(change: dict[str, Any], message: str, files: dict[str, str]) -> None:
    values = _values(files, reward={"kind": "rovrm", "path": "x"})
    values["prompts"]["images"] = "pictures"
    with pytest.raises(ConfigError, match=message):
        validate_config(policy.Config, {**values, **change}, "test")


@pytest.mark.parametrize("pictures", [True, pytest.param(False, marks=pytest.mark.soak)])
@pytest.mark.usefixtures("in_process")
def test_a_visual_reward_model_trains_a_policy(pictures: bool, tmp_path: Path) -> None:
    """With pictures all of the policy moves, its vision tower too; a policy of texts takes the same reward."""
    model, processor = tiny_visual_policy() if pictures else (tiny_model(), tiny_tokenizer())
    model.save_pretrained(tmp_path / "policy")
    processor.save_pretrained(tmp_path / "policy")
    save_reward_model(*tiny_llava(), tmp_path / "reward")
    for split in ("train", "dev"):
        write_visual(tmp_path / "data", 8, 0, split=split)
    values = {
        "algorithm": "rloo",
        "model": {"path": str(tmp_path / "policy")},
        "prompts": {
            "train": [{"path": str(tmp_path / "data" / "train.jsonl")}],
            "eval": [{"path": str(tmp_path / "data" / "dev.jsonl")}],
            "eval_limit": 2,
            **({"images": str(tmp_path / "data" / "images")} if pictures else {"column": "caption"}),
        },
        "reward": {"kind": "rovrm", "path": str(tmp_path / "reward")},
        "generation": {"answers": 2, "max_tokens": 5},
        "train": {"max_steps": 1, "batch_size": 4, "micro_batch_size": 4, "log_every": 1, "eval_every": 1},
        "optim": {"lr": 1e-3, "schedule": "constant", "warmup_ratio": 0.0},
        "run": {"dir": str(tmp_path / "run")},
    }
    done = policy.main(validate_config(policy.Config, values, "test"))
    records = read_metrics(done.path / "metrics.jsonl")
    assert len({record["rewards_rovrm_mean"] for record in records}) == len(records) == 3
    trained = load_file(done.path / "model" / "model.safetensors")
    start = load_file(tmp_path / "policy" / "model.safetensors")
    moved = {name for name in start if not torch.equal(start[name], trained[name])}
    assert any("layers" in name for name in moved)
    assert any("vision_tower" in name for name in moved) == pictures
    assert (done.path / "model" / "processor_config.json").is_file() == pictures


def test_prompts_come_in_passes_over_all_of_them() -> None:
    order = policy.prompt_order(5, 12, seed=0)
    assert len(order) == 12 and sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert order[:5] != order[5:10] and order[:10] == policy.prompt_order(5, 10, seed=0)
    assert order != policy.prompt_order(5, 12, seed=1)


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("{}")
    assert whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert whole_checkpoint(tmp_path / "nothing") is None
