"""Check A10 (lengths) and the subsampler's part of A12 (padding)."""

from __future__ import annotations

import pytest
import torch

from eagleray.models.nast.subsampler import Subsampler, subsampled_length

LENGTHS = {1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 8: 2, 9: 3, 16: 4, 17: 5, 100: 25, 1000: 250, 3000: 750}


def subsampler(*, mask_between: bool = True, strides: tuple[int, ...] = (2, 2)) -> Subsampler:
    torch.manual_seed(0)
    module = Subsampler(
        features=6, inner_width=16, width=8, strides=strides, dropout=0.0, mask_between=mask_between
    )
    return module.eval()


@pytest.mark.parametrize(("frames", "expected"), LENGTHS.items())
def test_a10_lengths_equal_those_of_the_convolutions(frames: int, expected: int) -> None:
    assert subsampled_length(frames) == expected
    output, lengths = subsampler()(torch.zeros(1, frames, 6), torch.tensor([frames]))
    assert output.shape == (1, expected, 8)
    assert lengths.tolist() == [expected]


def test_a10_three_strides() -> None:
    output, lengths = subsampler(strides=(2, 2, 2))(torch.zeros(1, 33, 6), torch.tensor([33]))
    assert output.shape[1] == lengths.item() == subsampled_length(33, (2, 2, 2)) == 5


@pytest.mark.parametrize("frames", [37, 38, 39, 40])
def test_a12_padding_reaches_no_frame_unless_the_mask_is_off(frames: int) -> None:
    """Alone and padded to 50: no frame differs; with the reference's missing mask exactly the last one does."""
    x = torch.randn(1, 50, 6, generator=torch.Generator().manual_seed(frames))
    x[:, frames:] = 9.0
    lengths = torch.tensor([frames])
    for mask_between, differing in ((True, []), (False, [subsampled_length(frames) - 1])):
        module = subsampler(mask_between=mask_between)
        padded = x.clone()
        if not mask_between:
            padded[:, frames:] = 0.0  # the reference's batches are padded with zeros
        alone, size = module(x[:, :frames], lengths)
        beside, _ = module(padded, lengths)
        gap = (beside[0, : size.item()] - alone[0]).abs().amax(1)
        assert (gap > 1e-5).nonzero().flatten().tolist() == differing
