"""Label logits against full logits, check 11, and prefix sharing, on random Llama, Qwen3 and Mistral."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from builders import ARCHITECTURES, Architecture, tiny_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from eagleray.models.gram.batching import pad_right
from eagleray.models.gram.losses import pair_logit_loss
from eagleray.models.gram.scoring import can_share_prefix, label_logits, label_logits_shared

LABELS = (36, 37)


def sequences(count: int = 5, *, seed: int = 0, longest: int = 40, vocabulary: int = 512) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest, (count,), generator=generator).tolist()
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def pad_left(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    ids, mask = pad_right([row[::-1] for row in rows])
    return ids.flip(1), mask.flip(1)


def one_by_one(model: nn.Module, rows: list[list[int]]) -> Tensor:
    """Slow reference: full logits of each prompt alone."""
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.tensor([row])).logits[0, -1] for row in rows])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pad", [pad_right, pad_left])
def test_equal_to_gathered_full_logits(architecture: Architecture, pad: Callable) -> None:
    model = tiny_model(architecture)
    rows = sequences()
    full = one_by_one(model, rows)
    ids, mask = pad(rows)
    logits = label_logits(model, ids, mask, LABELS)
    assert logits.shape == (5, 2) and logits.dtype == torch.float32
    torch.testing.assert_close(logits, full[:, list(LABELS)], atol=1e-5, rtol=0)
    torch.testing.assert_close(label_logits(model, ids, mask.bool(), LABELS), logits, atol=1e-6, rtol=0)
    whole = label_logits(model, ids, mask, LABELS, label_space="full_vocab")
    torch.testing.assert_close(whole, full, atol=1e-5, rtol=0)


def test_exact_in_float64_and_float32_for_bfloat16() -> None:
    rows = sequences()
    ids, mask = pad_right(rows)
    model = tiny_model().double()
    logits = label_logits(model, ids, mask, LABELS)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, one_by_one(model, rows)[:, list(LABELS)], atol=1e-12, rtol=0)
    assert label_logits(tiny_model().bfloat16(), ids, mask, LABELS).dtype == torch.float32


def tiny_gemma() -> PreTrainedModel:
    """Gemma 2 caps its logits with a tanh after the head."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, final_logit_softcapping=1.0,
        attn_implementation="eager",
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def test_scaling_of_logits_by_the_model_is_kept() -> None:
    model, rows = tiny_gemma(), sequences()
    logits = label_logits(model, *pad_right(rows), LABELS)
    assert logits.abs().max() <= 1.0
    torch.testing.assert_close(logits, one_by_one(model, rows)[:, list(LABELS)], atol=1e-5, rtol=0)


def test_only_two_rows_of_the_head_are_computed_and_its_hooks_run() -> None:
    """Hooks are how ZeRO-3 gathers the head's weight."""
    model, shapes = tiny_model(), []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: shapes.append((args[0].shape, output.shape)))
    label_logits(model, *pad_right(sequences(3)), LABELS)
    assert shapes == [((3, 1, 32), (3, 1, 2))]


@pytest.mark.parametrize("label_space", ["two_way", "full_vocab"])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_equal_those_of_full_logits(label_space: str, tied: bool) -> None:
    rows, labels = sequences(4), torch.tensor([0, 1, 1, 0])
    ids, mask = pad_right(rows)

    def gradients(model: PreTrainedModel, logits: Tensor) -> dict[str, Tensor]:
        pair_logit_loss(logits, labels, smoothing=0.1).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    ours, reference = (tiny_model(tie_word_embeddings=tied).double() for _ in range(2))
    logits = label_logits(ours, ids, mask, LABELS, label_space=label_space)  # type: ignore[arg-type]
    if label_space == "full_vocab":
        logits = logits[:, list(LABELS)]
    full = reference(input_ids=ids, attention_mask=mask).logits[torch.arange(4), mask.sum(1) - 1]
    mine, theirs = gradients(ours, logits), gradients(reference, full[:, list(LABELS)])
    assert mine.keys() == theirs.keys() == dict(ours.named_parameters()).keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, atol=1e-10, rtol=1e-8, msg=name)


def test_check_11_logits_are_read_one_position_before_the_label() -> None:
    """Neither later target tokens nor the label's own embedding can change them."""
    model, prompt = tiny_model(), sequences(1)[0]
    before = label_logits(model, *pad_right([prompt]), LABELS)
    full = model(input_ids=torch.tensor([[*prompt, LABELS[1], 3, 99]])).logits[0]
    torch.testing.assert_close(before[0], full[len(prompt) - 1, list(LABELS)], atol=1e-5, rtol=0)
    assert not torch.allclose(before[0], full[len(prompt), list(LABELS)], atol=1e-2)
    assert not set(LABELS) & set(prompt)
    with torch.no_grad():
        model.get_input_embeddings().weight[list(LABELS)] += 1.0
    assert torch.equal(label_logits(model, *pad_right([prompt]), LABELS), before)


def test_head_is_restored_also_after_an_error() -> None:
    model = tiny_model()
    head = model.get_output_embeddings()
    label_logits(model, *pad_right(sequences()), LABELS)
    assert "forward" not in vars(head)
    with pytest.raises(IndexError):
        label_logits(model, torch.tensor([[9999]]), torch.ones(1, 1), LABELS)
    assert "forward" not in vars(head)
    assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, 512)


@pytest.mark.parametrize(
    "options", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}]
)
def test_peft_model_with_an_adapted_head(options: dict[str, list[str]]) -> None:
    model = get_peft_model(
        tiny_model(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    ).eval()
    rows = sequences()
    expected = one_by_one(model, rows)[:, list(LABELS)]
    torch.testing.assert_close(label_logits(model, *pad_right(rows), LABELS), expected, atol=1e-5, rtol=0)
    shared = label_logits_shared(model, rows[0], rows, LABELS)
    torch.testing.assert_close(
        shared, one_by_one(model, [rows[0] + row for row in rows])[:, list(LABELS)], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("max_batch_tokens", [10_000, 150, 1], ids=["one batch", "chunks", "row by row"])
def test_shared_prefix_gives_the_unshared_logits(architecture: Architecture, max_batch_tokens: int) -> None:
    model = tiny_model(architecture)
    assert can_share_prefix(model)
    prefix, suffixes = sequences(1, seed=1)[0], sequences(7)
    shared = label_logits_shared(model, prefix, suffixes, LABELS, max_batch_tokens=max_batch_tokens)
    expected = one_by_one(model, [prefix + suffix for suffix in suffixes])[:, list(LABELS)]
    torch.testing.assert_close(shared, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix_length", [1, 7, 8, 9, 30])
def test_shared_prefix_with_a_sliding_window(prefix_length: int) -> None:
    model = tiny_model("mistral", sliding_window=8)
    prefix, suffixes = sequences(1, longest=31, seed=1)[0], sequences(7, longest=20)
    prefix = (prefix * 30)[:prefix_length]
    shared = label_logits_shared(model, prefix, suffixes, LABELS, max_batch_tokens=100)
    expected = one_by_one(model, [prefix + suffix for suffix in suffixes])[:, list(LABELS)]
    torch.testing.assert_close(shared, expected, atol=1e-5, rtol=0)


def test_prefix_is_computed_once_for_all_chunks() -> None:
    model, lengths = tiny_model(), []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: lengths.append(args[0].shape)
    )
    label_logits_shared(model, [1] * 50, [[2], [3], [4, 5]], LABELS, max_batch_tokens=102)
    assert lengths == [(1, 50), (1, 2), (2, 1)]


def test_recurrent_models_cannot_share() -> None:
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = MambaForCausalLM(config)
    assert not can_share_prefix(model)
    with pytest.raises(ValueError, match="MambaForCausalLM keeps more than keys and values of a prefix"):
        label_logits_shared(model, [1, 2], [[3]], LABELS)


def test_errors() -> None:
    ids, mask = pad_right(sequences(2))
    with pytest.raises(ValueError, match="`label_space` is 'both'; it must be 'two_way' or 'full_vocab'"):
        label_logits(tiny_model(), ids, mask, LABELS, label_space="both")  # type: ignore[arg-type]

    model = tiny_gemma()
    forward = model.forward
    model.forward = lambda logits_to_keep, **inputs: forward(**inputs)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="does not honour `logits_to_keep`"):
        label_logits(model, ids, mask, LABELS)
