"""Check A8: prediction-aware encoding, by hand, for every kind of adapter."""

from __future__ import annotations

import pytest
import torch

from eagleray.models.nast.prediction import AdapterKind, InnerPredictions, PredictionAdapter, token_table

TABLE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, -1.0]]).double()
LOGITS = torch.tensor([[[0.0, 1.0, 2.0, 3.0]]]).double()
H = torch.tensor([[[0.5, -0.5]]]).double()


def adapter_of(kind: AdapterKind) -> PredictionAdapter:
    torch.manual_seed(0)
    adapter = PredictionAdapter(kind=kind, width=2, vocab_size=4, pad_id=1).double()
    if hasattr(adapter, "weight"):
        adapter.weight.data.copy_(TABLE)
    return adapter


def test_a8_values() -> None:
    context = adapter_of("context")(H, LOGITS)
    torch.testing.assert_close(context, torch.tensor([[[1.556770, -0.319887]]]).double(), atol=1e-6, rtol=0)
    summed = adapter_of("inter_league")(H, LOGITS)
    torch.testing.assert_close(summed, torch.tensor([[[2.056770, -0.819887]]]).double(), atol=1e-6, rtol=0)


def test_a8_told_frame() -> None:
    """Smoothed one-hot at label 2: P E = 0.925 (1, 1) + 0.025 (3, 0) = (1, 0.925); plus h."""
    from eagleray.models.nast.curriculum import Oracle

    told = Oracle(torch.tensor([[2]]), torch.tensor([[True]]), 0.1)
    mixed = adapter_of("inter_league")(H, LOGITS, told)
    torch.testing.assert_close(mixed, torch.tensor([[[1.5, 0.425]]]).double(), atol=1e-6, rtol=0)


def test_kinds_are_built_from_each_other() -> None:
    assert torch.equal(adapter_of("none")(H, LOGITS), H)
    league, gated = adapter_of("league"), adapter_of("gated_league")
    gated.load_state_dict({**gated.state_dict(), **league.state_dict()})
    linear, context = league.linear(H), adapter_of("context")(H, LOGITS)
    torch.testing.assert_close(league(H, LOGITS), linear + context)
    only_linear = adapter_of("linear")
    only_linear.load_state_dict({k: v for k, v in league.state_dict().items() if k != "weight"})
    torch.testing.assert_close(only_linear(H, LOGITS), linear)
    gate = torch.sigmoid(gated.gate(torch.cat([linear, context], -1)))
    torch.testing.assert_close(gated(H, LOGITS), gate * linear + (1 - gate) * context)


def test_gradient_reaches_the_logits_through_the_prediction() -> None:
    logits = LOGITS.clone().requires_grad_()
    adapter_of("inter_league")(H, logits).sum().backward()
    assert logits.grad is not None and logits.grad.abs().min() > 1e-3


@pytest.mark.parametrize("from_normalised", [True, False])
def test_encoding_goes_on_from_the_normalised_state_or_from_the_stream(from_normalised: bool) -> None:
    inner = InnerPredictions(
        [3], kind="inter_league", from_normalised=from_normalised, width=4, vocab_size=5, pad_id=1
    )
    inner.adapter.weight.data.zero_()
    x = torch.randn(1, 2, 4) + 3.0
    state, logits = inner(3, x, lambda h: h.new_zeros(1, 2, 5))  # type: ignore[arg-type]
    torch.testing.assert_close(state, inner.norms["3"](x) if from_normalised else x)
    assert logits.shape == (1, 2, 5)


def test_table_of_tokens_has_unit_rows_on_average_and_no_padding() -> None:
    table = token_table(2000, 64, 1)
    assert table[1].abs().max() == 0.0
    assert table.square().sum(1).mean().item() == pytest.approx(1.0, abs=0.05)
