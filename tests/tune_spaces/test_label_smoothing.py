"""The label-smoothing space: its values, and that they mean the same in every config."""

from __future__ import annotations

import pytest
from ray.tune.search.sample import Float

from eagleray.tune_spaces import label_smoothing


def test_a_grid_holds_every_value_once() -> None:
    assert label_smoothing.space("grid")["loss.smoothing"] == {
        "grid_search": [0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3]
    }


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_other_searches_draw_from_the_range_of_the_grid(search: str) -> None:
    domain = label_smoothing.space(search)["loss.smoothing"]
    assert isinstance(domain, Float)
    assert (domain.lower, domain.upper) == (0.0, 0.3)


@pytest.mark.parametrize("search", ["grid", "random", "optuna"])
def test_the_convention_does_not_depend_on_the_config(search: str) -> None:
    assert label_smoothing.space(search)["loss.convention"] == "torch"


def test_selects_by_what_means_the_same_for_every_smoothing() -> None:
    assert (label_smoothing.METRIC, label_smoothing.MODE) == ("accuracy", "max")
