"""The last layer at one position, against the ordinary pass, on random Llama, Qwen2, Qwen3 and Mistral."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import Architecture, tiny_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache

from eagleray.models.backbone.last_layer import last_layer_at
from eagleray.models.lisa.convert import convert
from eagleray.models.lisa.spec import LisaSpec

ALL: tuple[Architecture, ...] = ("llama", "qwen2", "qwen3", "mistral")
IDS = torch.randint(0, 400, (3, 9), generator=torch.Generator().manual_seed(1))
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9, [0, 1, 1, 1, 1, 1, 1, 1, 1]])
RIGHT = LEFT.flip(1)


def at(states_BTD: Tensor, index_B: Tensor) -> Tensor:
    return states_BTD[torch.arange(len(index_B)), index_B]


def build(architecture: Architecture) -> nn.Module:
    """In double precision; windows of four tokens for Mistral, and for the last layer of Qwen3."""
    options: dict[str, Any] = {"mistral": {"sliding_window": 4}}.get(architecture, {})
    if architecture == "qwen3":
        options = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}
    return tiny_model(architecture, **options).model.double()


def narrow(model: Any, index_B: Tensor, mask_BT: Tensor | None = None, **inputs: Any) -> Tensor:
    with last_layer_at(model, index_B, mask_BT) as narrowed:
        states = model(input_ids=IDS, **inputs).last_hidden_state
    assert narrowed and states.shape == (3, 1, 32)
    return states[:, 0]


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("index", [[0, 0, 0], [8, 8, 8], [4, 8, 5]])
def test_equal_to_the_ordinary_pass_without_padding(architecture: Architecture, index: list[int]) -> None:
    model, index_B = build(architecture), torch.tensor(index)
    expected = at(model(input_ids=IDS).last_hidden_state, index_B)
    torch.testing.assert_close(narrow(model, index_B), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("mask_BT", [LEFT, RIGHT], ids=["left", "right"])
def test_equal_with_padding_on_either_side(architecture: Architecture, mask_BT: Tensor) -> None:
    model = build(architecture)
    index_B = (mask_BT * torch.arange(9)).argmax(1)
    inputs = {"attention_mask": mask_BT, "position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0)}
    expected = at(model(input_ids=IDS, **inputs).last_hidden_state, index_B)
    torch.testing.assert_close(narrow(model, index_B, mask_BT, **inputs), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("architecture", ALL)
def test_equal_behind_a_cached_prefix_and_the_cache_grows_as_ever(architecture: Architecture) -> None:
    model, index_B = build(architecture), torch.tensor([2, 8, 5])
    prefix = torch.arange(5).repeat(3, 1)
    caches = [DynamicCache(config=model.config), DynamicCache(config=model.config)]
    expected = [model(input_ids=part, past_key_values=caches[0]).last_hidden_state for part in (prefix, IDS)]
    with last_layer_at(model, torch.full((3,), 4)):
        first = model(input_ids=prefix, past_key_values=caches[1]).last_hidden_state
    torch.testing.assert_close(first[:, 0], expected[0][:, 4], atol=1e-12, rtol=0)
    second = narrow(model, index_B, past_key_values=caches[1])
    torch.testing.assert_close(second, at(expected[1], index_B), atol=1e-12, rtol=0)
    for ours, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-12, rtol=0)  # type: ignore[attr-defined]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_ordinary_pass_also_of_adapters(checkpointing: bool) -> None:
    """LoRA on all layers, dropout off; `checkpointing` recomputes the layers below."""
    options = LoraConfig(target_modules="all-linear", init_lora_weights=False, lora_dropout=0.0)
    ours, theirs = (get_peft_model(tiny_model("qwen3").model.double(), options) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    index_B, direction_D = torch.tensor([3, 8, 6]), torch.linspace(-1, 1, 32).double()
    for model in (ours, theirs):
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
    (narrow(ours, index_B, use_cache=False) @ direction_D).sum().backward()
    (at(theirs(input_ids=IDS, use_cache=False).last_hidden_state, index_B) @ direction_D).sum().backward()
    reference = dict(theirs.named_parameters())
    compared = [name for name, parameter in ours.named_parameters() if parameter.grad is not None]
    assert len(compared) == 2 * 2 * 7, "two factors of seven projections in two layers"
    for name in compared:
        mine, expected = ours.get_parameter(name).grad, reference[name].grad
        torch.testing.assert_close(mine, expected, atol=1e-12, rtol=1e-9, msg=name)


def test_the_last_layer_computes_one_position_and_all_are_as_before_afterwards() -> None:
    model, seen = tiny_model().model, []
    for layer in model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    narrow(model, torch.tensor([8, 8, 8]))
    assert seen == [(3, 9, 32), (3, 1, 32)]
    with pytest.raises(IndexError), last_layer_at(model, torch.tensor([0])):
        model(input_ids=torch.tensor([[9999]]))
    assert "forward" not in vars(model.layers[-1])
    assert model(input_ids=IDS).last_hidden_state.shape == (3, 9, 32)


def _replaced() -> nn.Module:
    model = tiny_model().model
    model.layers[-1].forward = model.layers[-1].forward
    return model


def _converted() -> nn.Module:
    return convert(tiny_model(), LisaSpec(shared_layers=(1,), rank=2), [IDS])


@pytest.mark.parametrize("made", [_replaced, _converted], ids=["hook", "lisa"])
def test_others_are_left_as_they_are(made: Any) -> None:
    model = made()
    with torch.no_grad(), last_layer_at(model, torch.tensor([8, 8, 8])) as narrowed:
        assert not narrowed
        found = model(input_ids=IDS)
    assert (found.logits if "logits" in found else found.last_hidden_state).shape[1] == 9
