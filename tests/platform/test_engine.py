"""The DeepSpeed JSON is made from the config by one function."""

from __future__ import annotations

import pytest
import torch
from toy_task import run_workers, toy_config

from eagleray.platform.config import ConfigError
from eagleray.platform.engine import build_engine, deepspeed_config


def test_plain_config_clips_outside_deepspeed() -> None:
    # Without ZeRO and in fp32, DeepSpeed clips but keeps the norm to itself; the engine's hook does both.
    assert deepspeed_config(toy_config()) == {
        "train_micro_batch_size_per_gpu": 8,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
    }


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_stage_precision_and_clipping(stage: int, precision: str) -> None:
    overrides = [f"deepspeed.zero_stage={stage}", f"train.precision={precision}", "optim.clip_norm=0.5"]
    config = deepspeed_config(toy_config(*overrides))
    assert config["zero_optimization"] == {"stage": stage}
    assert config["gradient_clipping"] == 0.5
    assert [key for key in ("bf16", "fp16") if key in config] == ([] if precision == "fp32" else [precision])


def test_offload() -> None:
    config = deepspeed_config(
        toy_config("deepspeed={zero_stage: 3, offload_optimizer: true, offload_params: true}")
    )
    zero = config["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu"} and zero["offload_param"] == {"device": "cpu"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("deepspeed={offload_optimizer: true}", r"offload_optimizer` needs `deepspeed.zero_stage` 1, 2 or 3"),
        (
            "deepspeed={zero_stage: 2, offload_params: true}",
            r"offload_params` needs `deepspeed.zero_stage` 3",
        ),
        ("train.batch_size=12", r"is 12; it must be a multiple of .* = 1 x 8 = 8"),
    ],
)
def test_contradictions_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        toy_config(override)


def _take_small_steps(rank: int, stage: int) -> None:
    cfg = toy_config(
        "train.precision=bf16",
        f"deepspeed.zero_stage={stage}",
        "optim={lr: 1.0e-4, schedule: constant, warmup_ratio: 0, weight_decay: 0}",
    )
    model = torch.nn.Linear(4, 4)
    torch.nn.init.ones_(model.weight)
    engine = build_engine(model, cfg, total_steps=100)
    inputs = torch.ones(2, 4, dtype=torch.bfloat16)
    for _ in range(100):
        engine.backward(engine(lambda module, x: module(x).float().sum(), inputs), scale_wrt_gas=False)
        engine.step()
    moved = 1 - model.weight.float()
    assert torch.all((moved - 0.01).abs() < 0.004), moved


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_bf16_keeps_updates_smaller_than_its_spacing(stage: int) -> None:
    """1 - 1e-4 is 1 in bf16: only masters in fp32 add a hundred such steps up, here to 0.01."""
    run_workers(_take_small_steps, 1, stage)
