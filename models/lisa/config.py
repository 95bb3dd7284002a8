"""Configs of the models: those of the parent architectures plus one object, `lisa_attention`."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from eagleray.models.lisa.spec import LisaSpec


def head_dim(config: Any) -> int:
    """Size of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layer_kinds(config: Any) -> list[str]:
    """Mask of each layer: `full_attention` or `sliding_attention`."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    sliding = getattr(config, "sliding_window", None) is not None
    return ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers


def resolve(config: Any, spec: LisaSpec) -> LisaSpec:
    """A specification with its defaults filled in for a model.

    Raises:
        ValueError: The model's layers cannot share as the specification says.
    """
    kinds, chains = layer_kinds(config), spec.chains(config.num_hidden_layers)
    for first, last in chains:
        if len(set(kinds[first : last + 1])) > 1:
            raise ValueError(
                f"Layers {first} to {last} would share scores, but their masks differ ({', '.join(kinds[first : last + 1])}). "
                "Share only within runs of equal masks: leave the first layer of each run out of `shared_layers`."
            )
    partial_rotary = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    if partial_rotary != 1.0:
        raise ValueError(
            f"The model rotates only {partial_rotary:g} of each head; sharing supports full rotary codes only."
        )
    return spec.resolved(
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
    )


class _ResolvesSpec:
    """Config classes below: check `lisa_attention` when a config is made."""

    lisa_attention: dict[str, Any] | None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        spec = LisaSpec.from_dict(self.lisa_attention or {})
        self.lisa_attention = resolve(self, spec).to_dict()


class LisaLlamaConfig(_ResolvesSpec, LlamaConfig):
    model_type = "lisa_llama"
    base_model_tp_plan = None  # type: ignore[assignment]  # f mixes the heads that tensor parallelism would split
    lisa_attention: dict | None = None


class LisaQwen2Config(_ResolvesSpec, Qwen2Config):
    model_type = "lisa_qwen2"
    base_model_tp_plan = None  # type: ignore[assignment]
    lisa_attention: dict | None = None


class LisaQwen3Config(_ResolvesSpec, Qwen3Config):
    model_type = "lisa_qwen3"
    base_model_tp_plan = None  # type: ignore[assignment]
    lisa_attention: dict | None = None


class LisaMistralConfig(_ResolvesSpec, MistralConfig):
    model_type = "lisa_mistral"
    base_model_tp_plan = None  # type: ignore[assignment]
    lisa_attention: dict | None = None
