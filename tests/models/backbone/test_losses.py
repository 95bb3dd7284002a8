import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eagleray.models.backbone.losses import token_losses
from eagleray.models.backbone.model import build_llama, llama_config


class FixedLogits(nn.Module):
    """Stands for a causal LM whose logits are given."""

    def __init__(self, logits_BTV):
        super().__init__()
        self.logits_BTV, self.head = logits_BTV, nn.Identity()

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.head(self.logits_BTV))


@pytest.fixture
def model():
    return build_llama(llama_config(vocab_size=50, width=32, layers=2, heads=4), seed=0)


@pytest.fixture
def batch():
    """Three right-padded rows of lengths 9, 6 and 4; the first two tokens of each are context."""
    ids_BT = torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    real_BT = torch.arange(9) < torch.tensor([[9], [6], [4]])
    return {"input_ids": ids_BT * real_BT, "target_mask": real_BT & (torch.arange(9) >= 2)}


def test_gram_check_12_target_tokens_only():
    """Target probabilities 0.5, 0.25, 0.125, 0.5: mean 1.213008; prompt tokens contribute nothing."""
    vocabulary, ids_BT = 8, torch.tensor([[5, 6, 1, 2, 3, 4]])
    mask_BT = torch.tensor([[False, False, True, True, True, True]])
    # NaN at the positions that predict prompt tokens, and at the last one: none of them may be read.
    probabilities = torch.full((1, 6, vocabulary), torch.nan, dtype=torch.float64)
    for position, p in zip(range(1, 5), (0.5, 0.25, 0.125, 0.5), strict=True):
        probabilities[0, position] = (1 - p) / (vocabulary - 1)
        probabilities[0, position, ids_BT[0, position + 1]] = p
    losses_BT = token_losses(FixedLogits(probabilities.log()), input_ids=ids_BT, target_mask=mask_BT)
    assert losses_BT.dtype == torch.float64 and losses_BT[0, :2].tolist() == [0, 0]
    assert losses_BT.sum().item() / 4 == pytest.approx(1.213008, abs=1e-6)
    half = token_losses(FixedLogits(probabilities.log().bfloat16()), input_ids=ids_BT, target_mask=mask_BT)
    assert half.dtype == torch.float32


def test_uniform_model_pays_log_vocabulary_for_every_target(model, batch):
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    losses_BT = token_losses(model, **batch)
    expected = torch.where(batch["target_mask"], math.log(50), 0.0)
    torch.testing.assert_close(losses_BT, expected)


def test_value_and_gradient_equal_those_of_all_logits(model, batch):
    labels_BT = batch["input_ids"].masked_fill(~batch["target_mask"], -100)
    logits_BTV = model(input_ids=batch["input_ids"]).logits
    slow = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), reduction="sum")
    slow_gradients = torch.autograd.grad(slow, list(model.parameters()))
    fast = token_losses(model, **batch).sum()
    fast_gradients = torch.autograd.grad(fast, list(model.parameters()))
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(fast_gradients, slow_gradients)


def test_value_agrees_with_the_loss_of_transformers(model, batch):
    labels_BT = batch["input_ids"].masked_fill(~batch["target_mask"], -100)
    theirs = model(input_ids=batch["input_ids"], labels=labels_BT).loss
    ours = token_losses(model, **batch).sum() / batch["target_mask"].sum()
    torch.testing.assert_close(ours, theirs)


def test_neither_padding_nor_company_changes_a_row(model, batch):
    together = token_losses(model, **batch)
    alone = token_losses(model, **{name: value[2:, :4] for name, value in batch.items()})
    torch.testing.assert_close(together[2:, :4], alone, atol=1e-6, rtol=1e-5)
    assert torch.equal(together[2, 4:], torch.zeros(5))


def test_model_is_left_as_it_was(model, batch):
    token_losses(model, **batch)
    assert model(input_ids=batch["input_ids"]).logits.shape == (3, 9, 50)
