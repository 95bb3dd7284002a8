"""Products of one attention layer: the order that is fast on a processor changes no result."""

from __future__ import annotations

import pytest
import torch

from eagleray.models.lisa import kernels


@pytest.mark.parametrize("intel", [True, False])
@pytest.mark.parametrize(("heads", "groups", "queries"), [(4, 4, 1), (4, 1, 1), (6, 2, 3)])
def test_scores_are_those_of_repeated_keys(
    intel: bool, heads: int, groups: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_INTEL", intel)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads, queries, 8, generator=generator)
    k = torch.randn(2, groups, 11, 8, generator=generator)
    repeated = k.repeat_interleave(heads // groups, 1)
    expected = torch.einsum("bhqd,bhtd->bhqt", q, repeated) * 0.3
    torch.testing.assert_close(kernels.full_scores(q, k, 0.3), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("time_last", [True, False])
@pytest.mark.parametrize(("heads", "groups", "queries"), [(4, 4, 1), (4, 1, 1), (6, 2, 3)])
def test_outputs_are_those_of_repeated_values(
    left: bool, time_last: bool, heads: int, groups: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_VALUES_ON_THE_LEFT", left)
    monkeypatch.setattr(kernels, "_OUTGROWS_CACHES", 4)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, heads, queries, 11, generator=generator)
    v = torch.randn(2, groups, 11, 8, generator=generator)
    expected = torch.einsum("bhqt,bhtd->bqhd", weights, v.repeat_interleave(heads // groups, 1)).flatten(2)
    if time_last:
        v = v.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(kernels.weighted_values(weights, v), expected, atol=1e-6, rtol=1e-5)
