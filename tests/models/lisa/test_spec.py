from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AutoConfig

from eagleray.models.lisa.config import LisaLlamaConfig, LisaMistralConfig, LisaQwen2Config, resolve
from eagleray.models.lisa.spec import AlignSpec, LisaSpec


def test_config_survives_a_round_trip(tmp_path: Any) -> None:
    """Check 20: lists of layers, ranks and pairs come back from JSON."""
    spec = LisaSpec(
        shared_layers=(2, 3),
        rank=(2, 4),
        rope_pairs=(((0,), (3,)), ((0, 1), (2, 3))),
        align=AlignSpec(kind="ffn", width=3),
        source="anchor",
    )
    config = LisaLlamaConfig(
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=32,
        head_dim=8,
        lisa_attention=json.loads(json.dumps(spec.to_dict())),
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LisaLlamaConfig
    assert LisaSpec.from_dict(loaded.lisa_attention) == resolve(config, spec)
    assert LisaSpec.from_dict(loaded.lisa_attention).rope_pairs == spec.rope_pairs


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shared_layers": (0, 1)}, "layer 0 has no layer below"),
        ({"shared_layers": (3, 2)}, "ascending order"),
        ({"shared_layers": (2,), "rank": 3}, "odd number"),
        ({"shared_layers": (2,), "rank": (2, 2)}, "lists 2 values for 1 shared layers"),
        ({"shared_layers": (2,), "rank": -2}, "0 or more"),
        ({"shared_layers": (2,), "stage": "weights"}, "can't be added to attention weights"),
        ({"rope": "half"}, "must be one of pairs, scaled, none"),
        ({"score_budget": -1}, "a size in MiB"),
        ({"align": {"kind": "mlp"}}, "must be one of none, identity, linear"),
        ({"align": {"kind": "linear", "width": 4}}, "only kinds with a hidden layer"),
        ({"layers": [2]}, "unknown keys"),
        ({"align": {"size": 2}}, r"unknown keys \['align.size'\]"),
    ],
)
def test_bad_specifications_are_refused(values: dict[str, Any], message: str) -> None:
    """Check 20: layer 0, odd ranks with rotary codes, and whatever else makes no sense."""
    with pytest.raises(ValueError, match=message):
        LisaSpec.from_dict(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shared_layers": (4,)}, "layers 0 to 3"),
        ({"shared_layers": (2,), "key_heads": 3}, "must divide the 4 query heads"),
        ({"shared_layers": (2,), "rank": 10}, "at most 8"),
        ({"shared_layers": (2,), "rank": 2, "rope_pairs": (((0,),),)}, "one for each of the 2 key heads"),
        ({"shared_layers": (2,), "rank": 2, "rope_pairs": (((0,), (4,)),)}, "from 0 to 3"),
    ],
)
def test_specifications_that_do_not_fit_a_model_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LisaSpec(**values).resolved(layers=4, heads=4, kv_heads=2, head_dim=8)


def test_layers_of_different_masks_do_not_share() -> None:
    """Check 20: a chain may not mix full and sliding-window layers; runs of equal windows may share."""
    shape: dict[str, Any] = {"num_hidden_layers": 4, "sliding_window": 4}
    mixed = {**shape, "use_sliding_window": True, "max_window_layers": 2}
    with pytest.raises(ValueError, match="their masks differ"):
        LisaQwen2Config(**mixed, lisa_attention={"shared_layers": [2]})
    assert LisaQwen2Config(**mixed, lisa_attention={"shared_layers": [1, 3]}).lisa_attention
    assert LisaMistralConfig(**shape, lisa_attention={"shared_layers": [1, 2]}).lisa_attention


def test_partial_rotary_codes_are_refused() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match=r"only 0\.5 of each head"):
        LisaLlamaConfig(rope_parameters=rope, lisa_attention={"shared_layers": [2]})


def test_default_pairs_are_spread_over_the_frequencies() -> None:
    spec = LisaSpec(shared_layers=(1,), rank=4).resolved(layers=2, heads=4, kv_heads=2, head_dim=16)
    assert spec.rope_pairs == (((2, 6), (2, 6)),)
    assert spec.scale_of(1, 16) == 0.25
