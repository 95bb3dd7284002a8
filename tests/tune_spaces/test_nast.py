"""The space of CTC-NAST: a grid of every combination, and ranges that hold the grid."""

from __future__ import annotations

from ray.tune.search.sample import Categorical, Float

from eagleray.tune_spaces import nast


def test_a_grid_holds_every_combination_once() -> None:
    sizes = [len(domain["grid_search"]) for domain in nast.space("grid").values()]
    assert sizes == [4, 2, 3]


def test_other_searches_draw_from_ranges_around_the_grid() -> None:
    random, grid = nast.space("random"), nast.space("grid")
    assert random.keys() == grid.keys()
    for key, domain in random.items():
        values = grid[key]["grid_search"]
        if isinstance(domain, Float):
            assert domain.lower <= min(values) and max(values) <= domain.upper
        else:
            assert isinstance(domain, Categorical) and domain.categories == values


def test_selects_by_what_means_the_same_for_every_loss() -> None:
    assert (nast.METRIC, nast.MODE) == ("bleu", "max")
