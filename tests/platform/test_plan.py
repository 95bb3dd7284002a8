"""The planner's arithmetic: known sizes, sums by hand, real peaks of memory, and what it proposes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eagleray.jobs.cli import main
from eagleray.jobs.plan import make_plan
from eagleray.models.backbone.model import build_llama, llama_config
from eagleray.platform.config import ConfigError
from eagleray.platform.plan import (
    GPUS,
    Hardware,
    ModelShape,
    Setting,
    Work,
    cheapest_setting,
    estimate_memory,
    estimate_times,
)
from eagleray.platform.sections import LoraSection

TINY = Path(__file__).resolve().parents[2] / "configs" / "gram" / "finetune_tiny.yaml"
LLAMA3_8B = ModelShape(4096, 32, 32, 8, 128, 14336, 128_256, tied=False)
JUDGE_8B = Work(LLAMA3_8B, tokens=2048, batch_size=128, logits=0, precision="bf16", lora=None)

SIZES: dict[str, Any] = {
    "width": 256,
    "layers": 6,
    "heads": 4,
    "kv_heads": 2,
    "vocab_size": 2000,
    "batch": 4,
    "tokens": 256,
    "rank": 0,
    "checkpointing": False,
}
CASES = {"full": {}, "lora": {"rank": 8}, "checkpointing": {"checkpointing": True, "layers": 10}}


def shape_of(values: dict[str, Any]) -> ModelShape:
    sizes = {key: values[key] for key in ("width", "layers", "heads", "kv_heads", "vocab_size")}
    return ModelShape.from_config(llama_config(**sizes))


@pytest.mark.ray  # a process of some seconds
def test_memory_agrees_with_real_training_within_15_percent() -> None:
    """Full training, LoRA and gradient checkpointing, in fp32 on one CPU."""
    cases = {name: {**SIZES, **changes} for name, changes in CASES.items()}
    script = Path(__file__).with_name("plan_step.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(list(cases.values()))],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_ARENA_MAX": "1"},
    )
    ratios = {}
    for (name, case), measured in zip(cases.items(), map(int, done.stdout.split()), strict=True):
        lora = LoraSection(rank=case["rank"]) if case["rank"] else None
        work = Work(shape_of(case), case["tokens"], case["batch"], case["tokens"] - 1, "fp32", lora)
        setting = Setting(micro_batch=case["batch"], gradient_checkpointing=case["checkpointing"])
        ratios[name] = estimate_memory(work, setting, 1).peak / measured
    assert all(0.85 <= ratio <= 1.15 for ratio in ratios.values()), ratios


def test_weights_are_counted_as_they_are() -> None:
    model = build_llama(llama_config(vocab_size=300, width=64, layers=3, heads=4, kv_heads=2), seed=0)
    assert ModelShape.from_config(model.config).parameters == model.num_parameters()
    assert LLAMA3_8B.parameters == 8_030_261_248


def test_adapters_are_counted_as_they_are() -> None:
    from peft import LoraConfig, get_peft_model

    model = build_llama(llama_config(vocab_size=300, width=64, layers=3, heads=4, kv_heads=2), seed=0)
    shape = ModelShape.from_config(model.config)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert shape.lora_parameters(4) == adapted.num_parameters(only_trainable=True)


@pytest.mark.parametrize(
    ("stage", "bytes_a_weight"),
    [(0, 2 + 2 + 12), (1, 2 + 2 + 12 / 8), (2, 2 + 2 / 8 + 12 / 8), (3, 2 / 8 + 2 / 8 + 12 / 8)],
)
def test_zero_shards_more_with_every_stage(stage: Any, bytes_a_weight: float) -> None:
    """The bytes of the ZeRO paper for mixed precision: 2 + 2 + 12, and 1/8 of what a stage shards."""
    memory = estimate_memory(JUDGE_8B, Setting(stage), gpus=8)
    gathered = 2e9 if stage == 3 else 0
    states = memory.weights + memory.gradients + memory.optimizer - gathered
    assert states == pytest.approx(bytes_a_weight * LLAMA3_8B.parameters)


def test_offloaded_parts_move_to_the_node() -> None:
    plain, offloaded = (
        estimate_memory(JUDGE_8B, Setting(3, offload, offload), gpus=8) for offload in (False, True)
    )
    assert offloaded.optimizer == 0 and offloaded.weights == 2e9
    assert offloaded.host == pytest.approx(plain.optimizer + plain.weights - 2e9)


def test_flops_of_a_step_by_hand() -> None:
    """6 a weight and token; 8 with recomputation; attention 2 products x 2 FLOPs x T/2 positions x D, times 3."""
    hardware = Hardware(1, 8, GPUS["h100"])
    tokens, matrices = 128 * 2048, 32 * LLAMA3_8B.block_matrices
    attention = 2 * 2 * (2048 / 2) * 4096 * 32
    found = estimate_times(JUDGE_8B, Setting(1), hardware)
    assert found.flops == pytest.approx(tokens * (6 * matrices + 3 * attention))
    again = estimate_times(JUDGE_8B, Setting(1, gradient_checkpointing=True), hardware)
    assert again.flops == pytest.approx(tokens * (8 * matrices + 4 * attention))
    assert found.compute_s == pytest.approx(found.flops / (8 * 989e12 * 0.4))
    assert found.network_bytes == pytest.approx(2 * 2 * LLAMA3_8B.parameters * 7 / 8)
    assert found.checkpoint_bytes == 14 * LLAMA3_8B.parameters


def test_the_proposal_fits_and_nothing_that_fits_is_faster() -> None:
    hardware = Hardware(1, 8, GPUS["h100"])
    best = cheapest_setting(JUDGE_8B, hardware)
    assert best is not None and estimate_memory(JUDGE_8B, best, 8).fits(hardware.gpu)
    assert not estimate_memory(JUDGE_8B, Setting(0), 8).fits(
        hardware.gpu
    )  # 16 bytes x 8e9 alone are too much
    step_s = estimate_times(JUDGE_8B, best, hardware).step_s
    for other in (replace(best, gradient_checkpointing=True), Setting(3, True, True, True, 1)):
        assert estimate_times(JUDGE_8B, other, hardware).step_s > step_s
    assert cheapest_setting(replace(JUDGE_8B, tokens=65536), Hardware(1, 1, GPUS["l4"])) is None


def test_the_command_prints_both_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["plan", str(TINY), "--gpus-per-node", "2", "--gpu", "a100", "train.precision=bf16"])
    assert not exit_.value.code
    printed = capsys.readouterr().out
    assert "Per GPU" in printed and "Proposed: deepspeed.zero_stage=0" in printed


@pytest.mark.parametrize(
    ("config", "gpu", "message"),
    [
        ("finetune_tiny", "b52", "`--gpu` is 'b52'; it must be one of l4"),
        ("evaluate_tiny", "h100", "does not train a model"),
    ],
)
def test_what_cannot_be_planned(config: str, gpu: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(TINY.with_name(f"{config}.yaml"), [], nodes=1, gpus_per_node=1, gpu=gpu, utilisation=0.4)
