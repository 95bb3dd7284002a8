"""Checks A1 to A4 (CTC) and A16 (loss algebra), and mixing inside the loss."""

from __future__ import annotations

import pytest
import torch
from nast_cases import (
    SECOND,
    A,
    batch_of,
    enumerated_loss,
    pad_labels,
    paths_by_label,
    tiny_model,
    tiny_sibling,
)
from torch import Tensor
from torch.nn.functional import ctc_loss

from eagleray.models.nast.curriculum import Mixing
from eagleray.models.nast.encoder import Prediction
from eagleray.models.nast.losses import LossWeights, autoregressive_loss, ctc_sum, ctc_terms, nast_loss
from eagleray.models.nast.metrics import infeasible_share


def loss_of(logits: Tensor, label: tuple[int, ...], **options: bool) -> Tensor:
    targets, counts = pad_labels([label])
    return ctc_sum(logits[None], torch.tensor([len(logits)]), targets, counts, **options)


@pytest.mark.parametrize(
    ("label", "paths", "loss"),
    [
        ((1, 2), 15, 1.554950),
        ((1,), 10, 1.835085),
        ((1, 1), 5, 3.221379),
        ((2, 1), 15, 2.276917),
        ((1, 2, 1), 7, 2.859455),
        ((), 1, 2.476938),
    ],
)
def test_a1_loss(label: tuple[int, ...], paths: int, loss: float) -> None:
    assert len(paths_by_label(A)[label]) == paths
    assert loss_of(A, label).item() == pytest.approx(loss, abs=1e-6)
    assert enumerated_loss(A, label) == pytest.approx(loss, abs=1e-6)


def test_a1_labels_sum_to_one_and_the_best_is_2() -> None:
    probabilities = {label: loss_of(A, label).neg().exp().item() for label in paths_by_label(A)}
    assert len(probabilities) == 15
    assert sum(probabilities.values()) == pytest.approx(1.0, abs=1e-12)
    best = max(probabilities, key=lambda label: probabilities[label])
    assert (best, round(probabilities[best], 6)) == ((2,), 0.2888)


def test_a1_infeasible_clips_have_zero_loss_and_gradient_and_are_counted() -> None:
    logits = A.clone().requires_grad_()
    assert loss_of(logits, (1, 1, 1), zero_infinity=False).item() == torch.inf
    loss = loss_of(logits, (1, 1, 1))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None and logits.grad.abs().max() == 0.0
    targets, counts = pad_labels([(1, 1, 1), (1, 2)])
    assert infeasible_share(torch.tensor([4, 4]), targets, counts) == 0.5


@pytest.mark.parametrize(
    ("label", "loss"),
    [((1, 2, 3), 2.157138), ((2, 2), 3.529118), ((3,), 5.978195), ((1, 1, 2), 5.380414)],
)
def test_a2_second_case(label: tuple[int, ...], loss: float) -> None:
    assert loss_of(SECOND, label).item() == pytest.approx(loss, abs=1e-6)
    assert enumerated_loss(SECOND, label) == pytest.approx(loss, abs=1e-6)


def test_a3_gradient() -> None:
    logits = A.clone().requires_grad_()
    loss_of(logits, (1, 2)).backward()
    expected = [
        (0.330114, -0.430114, 0.1),
        (0.173295, -0.183523, 0.010227),
        (0.218182, 0.077273, -0.295455),
        (-0.115341, 0.2, -0.084659),
    ]
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor(expected).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(4).double(), atol=1e-12, rtol=0)


def test_a4_padding_changes_neither_loss_nor_gradient() -> None:
    targets, counts = pad_labels([(1, 2), (1,), (1, 2, 1)])
    padded = torch.cat([A, torch.full((3, 3), 50.0).double()]).expand(3, -1, -1).clone().requires_grad_()
    loss = ctc_sum(padded, torch.tensor([4, 4, 4]), targets, counts)
    loss.backward()
    assert loss.item() == pytest.approx(1.554950 + 1.835085 + 2.859455, abs=2e-6)
    assert padded.grad is not None and padded.grad[:, 4:].abs().max() == 0.0


def test_value_and_gradient_are_those_of_ctc_on_the_whole_vocabulary() -> None:
    """With labels that come again, next to each other too, empty ones, clips too short for theirs, and padding."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(24, 20, 30, generator=generator, dtype=torch.float64)
    labels = torch.randint(1, 30, (24, 8), generator=generator)
    labels[:8] = labels[:8] % 2 + 1
    lengths = torch.randint(4, 21, (24,), generator=generator)
    counts = torch.randint(0, 9, (24,), generator=generator)
    counts[0], lengths[1], counts[1] = 0, 4, 8
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = ctc_sum(ours, lengths, labels, counts)
    log_probs = theirs.log_softmax(-1).transpose(0, 1)
    expected = ctc_loss(log_probs, labels, lengths, counts, reduction="sum", zero_infinity=True)
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-9)
    (3 * loss).backward()
    (3 * expected).backward()
    assert ours.grad is not None and theirs.grad is not None and not ours.grad[1].any()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=1e-9)
    with torch.no_grad():
        assert ctc_sum(logits, lengths, labels, counts) == loss


def test_losses_are_computed_in_float32() -> None:
    assert loss_of(A.bfloat16(), (1, 2)).dtype == torch.float32


def test_a16_terms_are_weighted_and_inner_ones_averaged() -> None:
    model, batch = tiny_model(inner_source_layers=[1, 2]).eval(), batch_of(3)
    weights = LossWeights(source=1.0, target=10.0, inner_source=100.0, inner_target=1000.0)
    loss, terms = nast_loss(model, *batch, weights=weights)
    expected = sum(w * terms[n] for n, w in vars(weights).items())
    torch.testing.assert_close(loss, expected)
    output = model(*batch[:2])
    assert list(output.inner_source) == [1, 2]
    single = [ctc_sum(p.logits_BSV, p.lengths_B, batch[2], batch[3]) for p in output.inner_source.values()]
    torch.testing.assert_close(terms["inner_source"], torch.stack(single).mean().detach())


@pytest.mark.parametrize("loss_function", [nast_loss, autoregressive_loss])
def test_a16_a_sum_does_not_depend_on_batch_mates_or_padding(loss_function: object) -> None:
    """Doubling the batch doubles the sum; a clip's loss alone and in a longer batch are the same."""
    model = (tiny_model() if loss_function is nast_loss else tiny_sibling()).eval()
    batch = batch_of(3)
    whole, _ = loss_function(model, *batch)  # type: ignore[operator]
    doubled, _ = loss_function(model, *(torch.cat([t, t]) for t in batch))  # type: ignore[operator]
    torch.testing.assert_close(doubled, 2 * whole)
    alone = []
    for i in range(3):
        features, lengths, *labels = (t[i : i + 1] for t in batch)
        cut = [labels[0][:, : labels[1][0]], labels[1], labels[2][:, : labels[3][0]], labels[3]]
        alone.append(loss_function(model, features[:, : lengths[0]], lengths, *cut)[0])  # type: ignore[operator]
    torch.testing.assert_close(torch.stack(alone).sum(), whole, rtol=1e-5, atol=1e-4)


def test_a16_gradient_accumulates_over_splits_with_layer_norm() -> None:
    """In training mode too, once BatchNorm is replaced; dropout, drop-net and mixing are off."""
    model = tiny_model(conv_norm="layer_norm", dropout=0.0, drop_net=0.0).train()
    batch, off = batch_of(4), Mixing(ratio=0.0)
    nast_loss(model, *batch, mixing=off)[0].backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for part in zip(*(t.split(2) for t in batch), strict=True):
        nast_loss(model, *part, mixing=off)[0].backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-4)


def test_every_parameter_gets_a_gradient_in_training() -> None:
    for model, function in ((tiny_model(), nast_loss), (tiny_sibling(), autoregressive_loss)):
        function(model.train(), *batch_of(3))[0].backward()  # type: ignore[operator]
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bfloat16_models_take_float32_features() -> None:
    batch = batch_of(3)
    full, _ = nast_loss(tiny_model().eval(), *batch)
    half, _ = nast_loss(tiny_model().bfloat16().eval(), *batch)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.0)
    nast_loss(tiny_model().bfloat16().train(), *batch)[0].backward()


def test_mixing_runs_the_textual_layers_once_more_on_the_same_acoustic_states() -> None:
    model, batch = tiny_model().train(), batch_of(3)
    calls: list[tuple[str, Tensor]] = []
    for part in (model.encoder.acoustic, model.encoder.textual.layers[0]):
        part.register_forward_hook(lambda module, given, _: calls.append((type(module).__name__, given[0])))

    def parts() -> list[str]:
        names = [name for name, _ in calls]
        calls.clear()
        return names

    nast_loss(model, *batch, mixing=Mixing(ratio=0.8))
    assert calls[1][1] is calls[2][1]
    assert parts() == ["AcousticEncoder", "TextualLayer", "TextualLayer"]
    nast_loss(model, *batch, mixing=Mixing(ratio=0.0))
    assert parts() == ["AcousticEncoder", "TextualLayer"]  # nothing to draw
    nast_loss(model.eval(), *batch)
    assert parts() == ["AcousticEncoder", "TextualLayer"]  # evaluation


def test_terms_without_inner_layers_are_absent() -> None:
    model, batch = tiny_model(inner_source_layers=[], inner_target_layers=[]), batch_of(2)
    loss, terms = nast_loss(model.train(), *batch)
    assert list(terms) == ["source", "target"]
    torch.testing.assert_close(loss.detach(), terms["source"] + terms["target"])


def test_terms_of_a_progressive_encoder_use_the_lengths_of_their_layer() -> None:
    """The lower layer has four times the frames of the top, here too few for the labels: only its loss is not 0."""
    logits = torch.zeros(1, 8, 5)
    low, top = Prediction(logits, torch.tensor([8])), Prediction(logits[:, :2], torch.tensor([2]))
    output = type("O", (), {"source": top, "target": top, "inner_source": {1: low}, "inner_target": {}})()
    labels = (torch.tensor([[1, 2, 3]]), torch.tensor([3]))
    terms = ctc_terms(output, *labels, *labels)  # type: ignore[arg-type]
    assert terms["source"] == 0.0 and terms["inner_source"] > 0.0
