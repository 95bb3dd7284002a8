"""The DeepSpeed JSON is made from the config by one function."""

from __future__ import annotations

import pytest
from toy_task import toy_config

from eagleray.platform.config import ConfigError
from eagleray.platform.engine import deepspeed_config


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
