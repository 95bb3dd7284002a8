"""The rank space: its values, and that every one of them can carry a rotary code."""

from __future__ import annotations

import pytest

from eagleray.tune_spaces import lisa_rank


def test_a_grid_holds_every_rank_once_and_all_are_even() -> None:
    domains = lisa_rank.space("grid")
    assert domains["share.rank"] == {"grid_search": list(lisa_rank.VALUES)}
    assert set(domains) == {"share.rank", "share.rope"}
    assert not any(rank % 2 for rank in lisa_rank.VALUES)


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_other_searches_choose_everything_that_the_rank_depends_on(search: str) -> None:
    domains = lisa_rank.space(search)
    assert domains["share.rank"].categories == list(lisa_rank.VALUES)
    assert set(domains) == {
        f"share.{key}" for key in ("rank", "fraction", "align.kind", "align.width", "rope", "key_heads")
    }
