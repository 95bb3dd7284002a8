"""Figures of a visual reward model."""

from __future__ import annotations

import pytest

from eagleray.models.rovrm.metrics import evaluate_pairs, length_correlation, ranked_pairs
from eagleray.models.rovrm.records import VisualPreference


def _record(name: str, *responses: str, image: str | None = None, group: str = "") -> VisualPreference:
    return VisualPreference(name, "Fact?", responses, image, group=group)


def test_ranked_answers_give_all_their_pairs() -> None:
    pairs = ranked_pairs([_record("1", "a", "b", "c")], ["s"], [[3.0, 1.0, 2.0]])
    assert [(p.better, p.worse, p.reward_better > p.reward_worse) for p in pairs] == [
        ("a", "b", True),
        ("a", "c", True),
        ("b", "c", False),
    ]


def test_figures_by_source_and_group() -> None:
    records = [_record(str(i), "yes", "no", image=f"{i // 2}.png", group=f"g{i % 2}") for i in range(8)]
    sources = ["large"] * 6 + ["small"] * 2
    rewards = [[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 2
    report = evaluate_pairs(ranked_pairs(records, sources, rewards), samples=100)
    assert report["accuracy"]["value"] == 0.75
    assert report["by_source"]["large"]["value"] == 1.0 and report["by_source"]["small"]["value"] == 0.0
    assert report["macro_accuracy"] == 0.5
    assert {name: row["pairs"] for name, row in report["by_group"].items()} == {"g0": 4, "g1": 4}
    assert report["prompts"] == 4  # pairs about one picture are drawn together


@pytest.mark.parametrize(("sign", "expected"), [(1, 1.0), (-1, -1.0)])
def test_length_correlation(sign: int, expected: float) -> None:
    """A scorer of lengths gets 1, whichever answer is the better one."""
    texts = ["a" * n for n in (1, 4, 9, 16, 25)]
    records = [_record(f"{i}-{j}", a, b) for i, a in enumerate(texts) for j, b in enumerate(texts) if i != j]
    rewards = [[sign * len(text) for text in record.responses] for record in records]
    pairs = ranked_pairs(records, [""] * len(records), rewards)
    assert length_correlation(pairs) == pytest.approx(expected)
    assert length_correlation(pairs[:1]) is None
