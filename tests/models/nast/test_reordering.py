"""Re-ordering found from texts alone, on numbers whose order is known; and the plots of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eagleray.models.nast.plots import plot_buckets, plot_scores
from eagleray.models.nast.reordering import reordering
from eagleray.models.nast.synthetic import english_digits, german_number


def test_numbers_with_ones_before_tens_are_turned() -> None:
    """47 is "sieben und vierzig" (turned), 40 "vierzig" and 16 "sech zehn" as one piece of the order."""
    numbers = [n for n in range(20, 100)]
    distances = reordering([english_digits(n) for n in numbers], [german_number(n) for n in numbers])
    found = dict(zip(numbers, distances, strict=True))
    turned = [found[n] for n in numbers if n % 10 > 1 and n // 10 != n % 10]
    assert sum(distance > 0 for distance in turned) > 0.9 * len(turned)
    assert found[40] == found[70] == 0


def test_the_same_order_is_monotone() -> None:
    sources = ["a b c", "b a", "c a b", "c b a", "a c"]
    assert reordering(sources, [text.upper() for text in sources]) == [0.0] * 5
    assert reordering([], []) == []


@pytest.mark.parametrize("score", [0.0, 55.5, 100.0])
def test_plots_are_drawn(tmp_path: Path, score: float) -> None:
    estimate = {"value": score, "low": max(0, score - 1), "high": score}
    models: dict[str, Any] = {name: {"bleu": estimate, "exact_match": estimate} for name in ("a", "b")}
    plot_scores(models, tmp_path / "scores.png", title="test")
    rows = [
        {"from": 0.0, "to": 0.0, "count": 3.0, "score": score},
        {"from": 0.0, "to": 0.1, "count": 1.0, "score": 1.0},
    ]
    plot_buckets({"a": rows, "b": rows}, tmp_path / "buckets.png", title="test", label="words")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("scores.png", "buckets.png"))
