"""The space of learning rates and batch sizes."""

from __future__ import annotations

import pytest
from ray.tune.search.sample import Categorical, Float

from eagleray.tune_spaces import optim


def test_a_grid_of_both() -> None:
    grid = optim.space("grid")
    assert grid["optim.lr"] == {"grid_search": [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3]}
    assert grid["train.batch_size"] == {"grid_search": [16, 32, 64]}


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_other_searches_draw_rates_evenly_on_a_logarithmic_scale(search: str) -> None:
    domains = optim.space(search)
    rate, size = domains["optim.lr"], domains["train.batch_size"]
    assert isinstance(rate, Float) and isinstance(size, Categorical)
    assert (rate.lower, rate.upper, size.categories) == (1e-5, 3e-3, [16, 32, 64])
    draws = rate.sample(size=200, random_state=0)
    assert 0.4 < sum(value < (1e-5 * 3e-3) ** 0.5 for value in draws) / 200 < 0.6
