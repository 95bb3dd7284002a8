"""The head alignment f without a gradient, where it adds in place."""

from __future__ import annotations

import pytest
import torch

from eagleray.models.lisa.alignment import HeadAlignment
from eagleray.models.lisa.spec import AlignKind, AlignSpec


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "ffn", "linear+ffn", "ffn_res", "glu"])
def test_without_a_gradient_the_numbers_are_the_same_and_scores_and_weights_stay(
    kind: AlignKind, bias: bool
) -> None:
    torch.manual_seed(0)
    align = HeadAlignment(AlignSpec(kind=kind, bias=bias), heads=4, width=3)
    for parameter in align.parameters():
        torch.nn.init.normal_(parameter)
    scores = torch.randn(2, 4, 5, 7)
    expected = align(scores).detach()
    before = [t.clone() for t in (scores, *align.parameters())]
    with torch.no_grad():
        assert torch.equal(align(scores), expected)
    for now, was in zip((scores, *align.parameters()), before, strict=True):
        assert torch.equal(now, was)
