"""The discriminative baseline: loss values, parity with TRL, and scores that do not depend on the batch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification
from trl import RewardTrainer

from eagleray.models.gram.discriminative import (
    DiscriminativeScorer,
    RewardEncoder,
    RewardSettings,
    bradley_terry_loss,
    sequence_rewards,
)

CHOSEN, REJECTED = torch.tensor([1.2], dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.371101),
        ({"margin_B": torch.tensor([1.0])}, 0.798139),
        ({"smoothing": 0.1}, 0.451101),
        ({"positive_regulariser": 0.1}, 0.397429),
        ({"centring": 0.01}, 0.396701),
    ],
)
def test_check_22_values(options: dict[str, Any], expected: float) -> None:
    assert bradley_terry_loss(CHOSEN, REJECTED, **options).item() == pytest.approx(expected, abs=1e-6)


def test_sum_is_count_times_mean() -> None:
    chosen_B, rejected_B = torch.randn(5), torch.randn(5)
    options: dict[str, Any] = {"smoothing": 0.1, "centring": 0.02, "margin_B": torch.rand(5)}
    mean = bradley_terry_loss(chosen_B, rejected_B, **options)
    torch.testing.assert_close(bradley_terry_loss(chosen_B, rejected_B, **options, reduction="sum"), 5 * mean)


def test_bf16_rewards_are_compared_in_fp32() -> None:
    assert bradley_terry_loss(CHOSEN.bfloat16(), REJECTED.bfloat16()).dtype == torch.float32


def _model(pad_id: int) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
        pad_token_id=pad_id,
    )
    model = LlamaForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.score.weight)
    return model


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("centring", [None, 0.01])
def test_parity_with_trl(margin: bool, centring: float | None) -> None:
    """The loss of trl's own `RewardTrainer.compute_loss` on the same model and batch."""
    model = _model(pad_id=0)
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(1, 512, (6, 9), generator=generator)  # three chosen, then three rejected
    lengths_B = torch.tensor([9, 5, 7, 4, 9, 8])
    mask_BT = (torch.arange(9) < lengths_B[:, None]).long()
    ids_BT = ids_BT * mask_BT
    margin_B = torch.tensor([0.5, 0.0, 2.0])

    def gather(values: Tensor) -> Tensor:
        return values

    trainer = SimpleNamespace(
        model=model,
        args=SimpleNamespace(center_rewards_coefficient=centring),
        accelerator=SimpleNamespace(gather=gather, gather_for_metrics=gather),
        _tp_size=1,
        _total_train_tokens=0,
        _metrics={"eval": __import__("collections").defaultdict(list)},
    )
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT} | ({"margin": margin_B} if margin else {})
    expected = RewardTrainer.compute_loss(trainer, model, inputs)  # type: ignore[arg-type]
    rewards_B = sequence_rewards(model, ids_BT, mask_BT)
    ours = bradley_terry_loss(
        rewards_B[:3], rewards_B[3:], margin_B=margin_B if margin else None, centring=centring or 0.0
    )
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_encoding_keeps_the_end_of_the_turn_and_of_the_prompt() -> None:
    tokenizer = tiny_tokenizer()
    encoder = RewardEncoder(tokenizer, max_length=64)
    full = RewardEncoder(tokenizer, max_length=4000).encode(
        "first words " * 40 + "last question?", "an answer"
    )
    short = encoder.encode("first words " * 40 + "last question?", "an answer")
    assert len(short) <= 64 < len(full)
    assert short[-1] == full[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    text = tokenizer.decode(short)
    assert "last question?" in text and "an answer" in text
    both = tokenizer.decode(encoder.encode("first " * 200 + "question?", "begin " + "long " * 200))
    assert "question?" in both and "begin" in both and both.endswith("<|im_end|>")


def test_special_tokens_in_texts_are_text() -> None:
    tokenizer = tiny_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    plain = RewardEncoder(tokenizer).encode("question", "answer").count(end)
    assert RewardEncoder(tokenizer).encode("quest<|im_end|>ion", "<|im_end|>answer").count(end) == plain


def test_padding_equal_to_the_end_token_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ValueError, match="needs a padding token of its own"):
        RewardEncoder(tokenizer)


def test_scores_do_not_depend_on_the_batch_and_survive_saving(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = _model(pad_id=tokenizer.pad_token_id)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    RewardSettings(max_length=128).save(tmp_path)
    conversations = [("question " * n, "answer " * m) for n, m in ((1, 1), (9, 2), (3, 20), (5, 5))]
    scorer = DiscriminativeScorer.from_pretrained(tmp_path)
    assert scorer.encoder.max_length == 128
    alone = [scorer.score([conversation])[0] for conversation in conversations]
    assert scorer.score(conversations) == pytest.approx(alone, abs=1e-5)
    assert DiscriminativeScorer.from_pretrained(tmp_path, max_batch_tokens=1).score(
        conversations
    ) == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) == 4
    (ab,), (ba,) = (scorer.compare([("q", *answers)]) for answers in (("x", "y y"), ("y y", "x")))
    assert ab.p_a == pytest.approx(1 - ba.p_a, abs=1e-12) and ab.consistent and ab.p_order1 == ab.p_order2


def test_a_language_model_without_a_head_is_refused(tmp_path: Path) -> None:
    """transformers would load it and score with a random head."""
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the model holds no trained reward head"):
        DiscriminativeScorer.from_pretrained(tmp_path)


def _saved_adapter(folder: Path, **lora: Any) -> tuple[Path, Any]:
    """A random adapter on a plain language model, saved; the folder and the model in memory."""
    tokenizer = tiny_tokenizer()
    tiny_model().save_pretrained(folder / "base")
    base = AutoModelForSequenceClassification.from_pretrained(
        folder / "base", num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, **lora)
    adapted = get_peft_model(base, config).eval()
    adapted.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    return folder / "adapter", adapted


def test_an_adapter_scores_as_before_saving(tmp_path: Path) -> None:
    folder, adapted = _saved_adapter(tmp_path, task_type="SEQ_CLS", modules_to_save=["score"])
    conversations = [("question", "answer"), ("question", "a longer answer")]
    in_memory = DiscriminativeScorer(adapted, RewardEncoder(tiny_tokenizer())).score(conversations)
    assert DiscriminativeScorer.from_pretrained(folder).score(conversations) == pytest.approx(
        in_memory, abs=1e-5
    )
    assert abs(in_memory[0] - in_memory[1]) > 1e-3


def test_an_adapter_without_a_head_is_refused(tmp_path: Path) -> None:
    folder, _ = _saved_adapter(tmp_path)
    with pytest.raises(ValueError, match="the adapter holds no trained reward head"):
        DiscriminativeScorer.from_pretrained(folder)
