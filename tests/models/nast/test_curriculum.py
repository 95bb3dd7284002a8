"""Checks A7 (mistakes and mixing), A8 (the oracle's rows) and the decay of A17."""

from __future__ import annotations

import pytest
import torch
from nast_cases import A, batch_of, pad_labels, tiny_model

from eagleray.models.nast.alignment import align
from eagleray.models.nast.curriculum import (
    Mixing,
    Oracle,
    decayed_ratio,
    draw_oracle,
    find_mistakes,
    mix_oracle,
)
from eagleray.models.nast.losses import nast_loss
from eagleray.models.nast.prediction import PredictionAdapter

LABELS = [(1, 2), (1, 1), (2, 1)]
MISTAKES = [[1, 0, 0, 0], [1, 0, 1, 1], [0, 0, 0, 1]]


def case_a() -> tuple[torch.Tensor, torch.Tensor, object]:
    """A with two padding frames, for the three labels of check A7."""
    logits = torch.cat([A, torch.zeros(2, 3).double()]).expand(3, -1, -1)
    targets, counts = pad_labels(LABELS)
    lengths = torch.tensor([4, 4, 4])
    return logits, lengths, align(logits, lengths, targets, counts)


def test_a7_mistakes() -> None:
    logits, lengths, paths = case_a()
    mistakes = find_mistakes(logits, lengths, paths)  # type: ignore[arg-type]
    assert mistakes[:, :4].int().tolist() == MISTAKES
    assert not mistakes[:, 4:].any()
    assert (mistakes.sum(1) / lengths).tolist() == [0.25, 0.75, 0.25]


def test_a7_ratio_1_tells_exactly_the_mistakes_and_ratio_0_nothing() -> None:
    logits, lengths, paths = case_a()
    everything = draw_oracle(logits, lengths, paths, Mixing(ratio=1.0))  # type: ignore[arg-type]
    assert everything.told_BS[:, :4].int().tolist() == MISTAKES
    nothing = draw_oracle(logits, lengths, paths, Mixing(ratio=0.0))  # type: ignore[arg-type]
    assert not nothing.told_BS.any()
    also_right = draw_oracle(logits, lengths, paths, Mixing(ratio=1.0, only_mistakes=False))  # type: ignore[arg-type]
    assert also_right.told_BS[:, :4].all() and not also_right.told_BS[:, 4:].any()


@pytest.mark.parametrize(
    ("mixing", "shares"),
    [
        (Mixing(ratio=0.8), (0.8, 0.8, 0.8)),
        # adaptive: 0.8 times the clip's share of mistakes, 1/4, 3/4, 1/4
        (Mixing(ratio=0.8, adaptive=True), (0.2, 0.6, 0.2)),
    ],
)
def test_a7_share_of_told_mistakes(mixing: Mixing, shares: tuple[float, ...]) -> None:
    logits, lengths, paths = case_a()
    generator = torch.Generator().manual_seed(0)
    draws = [
        draw_oracle(logits, lengths, paths, mixing, generator=generator).told_BS.sum(1)  # type: ignore[arg-type]
        for _ in range(600)
    ]
    told = torch.stack(draws).float().mean(0) / torch.tensor([1.0, 3.0, 1.0])
    torch.testing.assert_close(told, torch.tensor(shares), atol=0.05, rtol=0)


def test_infeasible_clips_are_not_mixed() -> None:
    targets, counts = pad_labels([(1, 1, 1)])
    paths = align(A[None], torch.tensor([4]), targets, counts)
    for only in (True, False):
        drawn = draw_oracle(A[None], torch.tensor([4]), paths, Mixing(ratio=1.0, only_mistakes=only))
        assert not drawn.told_BS.any()


def test_a8_rows_of_the_smoothed_oracle() -> None:
    told = Oracle(torch.tensor([[2, 1]]), torch.tensor([[True, False]]), 0.1)
    p = torch.tensor([[[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]]).double()
    mixed = mix_oracle(p, told)
    torch.testing.assert_close(mixed[0, 0], torch.tensor([0.025, 0.025, 0.925, 0.025]).double())
    assert torch.equal(mixed[0, 1], p[0, 1])
    large = mix_oracle(
        torch.zeros(1, 1, 10_000).double(), Oracle(torch.tensor([[7]]), torch.tensor([[True]]), 0.1)
    )
    assert large[0, 0, 7].item() == pytest.approx(0.90001)
    assert large[0, 0, 8].item() == pytest.approx(1e-5)
    assert large.sum().item() == pytest.approx(1.0)


def test_a7_nothing_told_equals_plain_encoding_bit_for_bit() -> None:
    torch.manual_seed(0)
    adapter = PredictionAdapter(kind="inter_league", width=4, vocab_size=5, pad_id=1)
    h, logits = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    silent = Oracle(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool), 0.1)
    assert torch.equal(adapter(h, logits, silent), adapter(h, logits))


def test_a7_no_mixing_in_evaluation_mode() -> None:
    model, batch = tiny_model().eval(), batch_of(3)
    mixed, _ = nast_loss(model, *batch, mixing=Mixing(ratio=1.0))
    plain, _ = nast_loss(model, *batch, mixing=Mixing(ratio=0.0))
    assert torch.equal(mixed, plain)


def test_mixing_changes_the_loss_in_training_and_follows_its_generator() -> None:
    model, batch = tiny_model(dropout=0.0, drop_net=0.0).train(), batch_of(3)
    values = [
        nast_loss(model, *batch, mixing=Mixing(ratio=ratio), generator=torch.Generator().manual_seed(seed))[
            0
        ].item()
        for ratio, seed in ((0.0, 0), (0.5, 0), (0.5, 0), (0.5, 3))
    ]
    assert values[1] == values[2]
    assert len({*values}) == 3


@pytest.mark.parametrize(
    ("step", "ratio"), [(0, 0.8), (20_000, 0.8), (25_000, 0.6), (30_000, 0.4), (40_000, 0.0), (99_000, 0.0)]
)
def test_a17_decay(step: int, ratio: float) -> None:
    value = decayed_ratio(step, start=20_000, end=40_000, first=0.8, last=0.0)
    assert value == pytest.approx(ratio)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"`ratio` is 1.5; it must be in \[0, 1\]"):
        Mixing(ratio=1.5)
    with pytest.raises(ValueError, match="`start` is 5 and `end` is 5; `end` must be larger"):
        decayed_ratio(1, start=5, end=5, first=1.0, last=0.0)
