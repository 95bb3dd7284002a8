"""The rank space: its values, and that every one of them can carry a rotary code."""

from __future__ import annotations

import pytest

from eagleray.tune_spaces import lisa_rank


def test_a_grid_holds_every_rank_once_and_all_are_even() -> None:
    assert lisa_rank.space("grid")["share.rank"] == {"grid_search": [0, 4, 8, 12, 16, 20, 24, 32]}
    assert not any(rank % 2 for rank in lisa_rank.VALUES)


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_other_searches_choose_among_the_grid(search: str) -> None:
    assert lisa_rank.space(search)["share.rank"].categories == list(lisa_rank.VALUES)
