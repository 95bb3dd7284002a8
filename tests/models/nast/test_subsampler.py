"""Check A10 (lengths) and the subsampler's part of A12 (padding)."""

from __future__ import annotations

import pytest
import torch

from eagleray.models.nast.subsampler import (
    Conv1dSubsampler,
    Conv2dSubsampler,
    Subsampler,
    subsampled_length,
)

LENGTHS = {1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 8: 2, 9: 3, 16: 4, 17: 5, 100: 25, 1000: 250, 3000: 750}


KINDS = [Conv1dSubsampler, Conv2dSubsampler]


def subsampler(
    kind: type[Subsampler] = Conv1dSubsampler,
    *,
    mask_between: bool = True,
    strides: tuple[int, ...] = (2, 2),
    features: int = 6,
) -> Subsampler:
    torch.manual_seed(0)
    module = kind(
        features=features, inner_width=16, width=8, strides=strides, dropout=0.0, mask_between=mask_between
    )
    return module.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("frames", "expected"), LENGTHS.items())
def test_a10_lengths_equal_those_of_the_convolutions(
    frames: int, expected: int, kind: type[Subsampler]
) -> None:
    assert subsampled_length(frames) == expected
    output, lengths = subsampler(kind)(torch.zeros(1, frames, 6), torch.tensor([frames]))
    assert output.shape == (1, expected, 8)
    assert lengths.tolist() == [expected]


@pytest.mark.parametrize("kind", KINDS)
def test_a10_three_strides(kind: type[Subsampler]) -> None:
    output, lengths = subsampler(kind, strides=(2, 2, 2))(torch.zeros(1, 33, 6), torch.tensor([33]))
    assert output.shape[1] == lengths.item() == subsampled_length(33, (2, 2, 2)) == 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [37, 38, 39, 40])
def test_a12_padding_reaches_no_frame_unless_the_mask_is_off(frames: int, kind: type[Subsampler]) -> None:
    """Alone and padded to 50: no frame differs; with the reference's missing mask exactly the last one does, if it reads on."""
    x = torch.randn(1, 50, 6, generator=torch.Generator().manual_seed(frames))
    x[:, frames:] = 9.0
    lengths = torch.tensor([frames])
    reads_on = kind is Conv1dSubsampler or frames < 39  # a kernel of 3 ends with 20 frames, not with 19
    last = [subsampled_length(frames) - 1] if reads_on else []
    for mask_between, differing in ((True, []), (False, last)):
        module = subsampler(kind, mask_between=mask_between)
        padded = x.clone()
        if not mask_between:
            padded[:, frames:] = 0.0  # the reference's batches are padded with zeros
        alone, size = module(x[:, :frames], lengths)
        beside, _ = module(padded, lengths)
        gap = (beside[0, : size.item()] - alone[0]).abs().amax(1)
        assert (gap > 1e-5).nonzero().flatten().tolist() == differing


def test_convolutions_over_frequency_meet_a_higher_voice_with_the_same_filters() -> None:
    """Moved up by as many bins as the strides divide by, what lies between silent bins gives the same one position higher."""
    module = subsampler(Conv2dSubsampler, features=32)
    low = torch.zeros(1, 24, 32)
    low[:, :, 8:16] = torch.rand(1, 24, 8, generator=torch.Generator().manual_seed(0))
    planes = []
    module.projection.register_forward_pre_hook(lambda _, inputs: planes.append(inputs[0]))
    for x in (low, low.roll(4, dims=2)):
        module(x, torch.tensor([24]))
    before, after = (plane.view(6, 16, 8) for plane in planes)
    # Where silence meets the edge of the spectrum the convolutions see padding, which is the same in both.
    torch.testing.assert_close(after[:, :, 2:7], before[:, :, 1:6])
    assert (before[:, :, 1:6] != before[:, :, 1:2]).any()
