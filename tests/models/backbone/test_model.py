import pytest
import torch
from transformers import AutoModelForCausalLM

from eagleray.models.backbone.model import build_llama, llama_config

SIZES = {"vocab_size": 50, "width": 32, "layers": 2, "heads": 4}


def test_number_of_parameters_by_hand():
    """Per layer: q and o 32x32, k and v 32x16, three MLP matrices 32x96, two norms; embeddings once; last norm."""
    config = llama_config(**SIZES, kv_heads=2)
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 96 + 2 * 32
    assert build_llama(config, seed=0).num_parameters() == 2 * layer + 50 * 32 + 32
    untied = llama_config(**SIZES, kv_heads=2, tie_embeddings=False)
    assert build_llama(untied, seed=0).num_parameters() == 2 * layer + 2 * 50 * 32 + 32


def test_options_reach_the_config():
    config = llama_config(**SIZES, mlp_ratio=4, max_length=77, rope_theta=5e4, pad_id=0, bos_id=1, eos_id=2)
    assert (config.intermediate_size, config.max_position_embeddings) == (128, 77)
    assert config.rope_parameters["rope_theta"] == 5e4
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert config.num_key_value_heads == 4


def test_weights_depend_on_the_seed_alone_and_the_global_state_is_kept():
    config = llama_config(**SIZES)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = build_llama(config, seed=5)
    assert torch.equal(torch.rand(3), expected)
    again, other = build_llama(config, seed=5), build_llama(config, seed=6)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(first.get_input_embeddings().weight, other.get_input_embeddings().weight)


def test_untrained_model_is_nearly_uniform_and_causal():
    model = build_llama(llama_config(**SIZES), seed=0).eval()
    ids_BT = torch.arange(20)[None]
    with torch.no_grad():
        logits_BTV = model(input_ids=ids_BT).logits
        changed = model(input_ids=torch.cat([ids_BT[:, :10], ids_BT[:, 10:] + 20], 1)).logits
    assert logits_BTV.softmax(-1).max() < 0.1
    assert torch.allclose(logits_BTV[:, :10], changed[:, :10], atol=1e-6)
    assert not torch.allclose(logits_BTV[:, 10:], changed[:, 10:], atol=1e-3)


def test_saved_model_loads_with_the_same_logits(tmp_path):
    model = build_llama(llama_config(**SIZES, pad_id=0, bos_id=1, eos_id=2), seed=0).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids_BT = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids_BT).logits, loaded(input_ids=ids_BT).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 36}, "`width` is 36; it must be a multiple of 2 x `heads` = 8"),
        ({"kv_heads": 3}, "`kv_heads` is 3; it must divide `heads` = 4"),
        ({"kv_heads": 0}, "`kv_heads` is 0; it must be at least 1"),
        ({"layers": 0}, "`layers` is 0; it must be at least 1"),
        ({"heads": 0}, "`heads` is 0"),
        ({"vocab_size": -1}, "`vocab_size` is -1"),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        llama_config(**(SIZES | options))
