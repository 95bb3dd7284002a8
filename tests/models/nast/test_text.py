"""The textual encoder on text: lengths, padding, ties, and that it learns a reversed order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eagleray.models.nast.curriculum import Mixing
from eagleray.models.nast.decoding import greedy
from eagleray.models.nast.text import TextConfig, TextModel, text_loss

SIZES: dict[str, Any] = {"vocab_size": 12, "width": 32, "heads": 2, "inner_width": 64, "textual_layers": 3}
SIZES |= {
    "inner_target_layers": [2],
    "cross_layer_source": 1,
    "upsampling": 2,
    "dropout": 0.0,
    "drop_net": 0.0,
}


def tiny_text(**changes: Any) -> TextModel:
    torch.manual_seed(0)
    return TextModel(TextConfig(**{**SIZES, **changes}))


def reversed_pairs(count: int = 24) -> tuple[torch.Tensor, ...]:
    """Sources of 2 to 5 pieces from 4 to 7; the translation of a piece is 4 above it, the order is reversed."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 6, (count,), generator=generator)
    source = torch.randint(4, 8, (count, 5), generator=generator)
    target = torch.zeros_like(source)
    for row, length in enumerate(lengths.tolist()):
        target[row, :length] = source[row, :length].flip(0) + 4
    return source, lengths, target, lengths


def test_each_piece_has_its_positions_and_padding_changes_nothing() -> None:
    model = tiny_text(upsampling=3).eval()
    source, lengths, *_ = reversed_pairs(4)
    together = model(source, lengths).target
    assert together.logits_BSV.shape == (4, 15, 12) and torch.equal(together.lengths_B, 3 * lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = model(source[row : row + 1, :length], lengths[row : row + 1]).target.logits_BSV[0]
        torch.testing.assert_close(together.logits_BSV[row, : 3 * length], alone, atol=1e-5, rtol=0)


def test_the_order_of_the_source_matters() -> None:
    """Unlike frames of speech, pieces have no neighbours that tell where they stand: they need positions."""
    model = tiny_text().eval()
    one, other = (model(torch.tensor([row]), torch.tensor([2])).target.logits_BSV for row in ([4, 5], [5, 4]))
    assert (one[:, :2] - other[:, 2:]).abs().max() > 1e-3


def test_the_embedding_is_the_head_also_after_saving(tmp_path: Path) -> None:
    model = tiny_text().eval()
    assert model.embedding.weight is model.target_head.weight
    model.save_pretrained(tmp_path)
    again = TextModel.from_pretrained(tmp_path).eval()
    assert again.embedding.weight is again.target_head.weight
    source, lengths, *_ = reversed_pairs(2)
    assert torch.equal(again(source, lengths).target.logits_BSV, model(source, lengths).target.logits_BSV)


def test_the_loss_sums_its_terms_and_reaches_every_parameter() -> None:
    model, batch = tiny_text().train(), reversed_pairs(4)
    loss, terms = text_loss(model, *batch, mixing=Mixing(ratio=1.0))
    assert loss.item() == pytest.approx(sum(term.item() for term in terms.values()))
    assert sorted(terms) == ["inner_target", "target"]
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    plain, _ = text_loss(model, *batch, mixing=Mixing(ratio=0.0))
    assert plain.item() != loss.item()


def test_it_learns_a_reversed_order() -> None:
    model, batch = tiny_text(), reversed_pairs()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3, betas=(0.9, 0.98))
    expected = [row[:n].tolist() for row, n in zip(batch[2], batch[3], strict=True)]
    for step in range(1, 301):
        (text_loss(model.train(), *batch)[0] / (batch[3] + 1).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            with torch.inference_mode():
                output = model.eval()(*batch[:2]).target
            if greedy(output.logits_BSV, output.lengths_B) == expected:
                return
    pytest.fail("not exact within 300 steps")


def test_errors() -> None:
    with pytest.raises(ValueError, match="`upsampling` is 0; it must be at least 1"):
        TextConfig(**{**SIZES, "upsampling": 0})
