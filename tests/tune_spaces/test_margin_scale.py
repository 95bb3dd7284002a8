"""The space of margin scales: its values, and that margins are in use."""

from __future__ import annotations

import pytest

from eagleray.tune_spaces import margin_scale


def test_a_grid_holds_the_plain_loss_and_every_value_once() -> None:
    grid = margin_scale.space("grid")["loss.margin_scale"]
    assert grid == {"grid_search": [0.0, 0.25, 0.5, 1.0, 2.0]}


@pytest.mark.parametrize("search", ["grid", "random"])
def test_margins_are_in_use_whatever_the_config_says(search: str) -> None:
    space = margin_scale.space(search)
    assert space["loss.use_margin"] is True and space["loss.margin_form"] == "subtract"
