"""Generated pairs: the rule holds, nothing else tells the answers apart, parts share no request."""

from __future__ import annotations

import numpy as np
import pytest

from eagleray.models.gram.baselines import BagOfWords, LongerAnswer
from eagleray.models.gram.judge import Comparison
from eagleray.models.gram.synthetic import (
    RuleJudge,
    Split,
    in_order,
    make_corpus,
    make_preferences,
    make_unlabelled,
    order_score,
    split_of,
)


def _triples(n: int, split: Split, **options: float) -> list[tuple[str, str, str]]:
    return [(r["prompt"], r["chosen"], r["rejected"]) for r in make_preferences(n, 0, split=split, **options)]


def _accuracy(comparisons: list[Comparison]) -> float:
    return float(np.mean([c.p_a > 0.5 for c in comparisons]))


def test_rule() -> None:
    for _, chosen, rejected in _triples(200, "train"):
        assert in_order(chosen) and not in_order(rejected)
    assert _accuracy(RuleJudge().compare(_triples(200, "test"))) == 1.0


def test_label_noise_sets_the_ceiling() -> None:
    accuracy = _accuracy(RuleJudge().compare(_triples(2000, "train", label_noise=0.2)))
    assert accuracy == pytest.approx(0.8, abs=3 * (0.2 * 0.8 / 2000) ** 0.5)
    with pytest.raises(ValueError, match=r"`label_noise` is 0.5; it must be in \[0, 0.5\)"):
        make_preferences(1, 0, label_noise=0.5)


def test_words_and_length_are_at_chance() -> None:
    """Three standard errors of 600 pairs are 0.061."""
    test = _triples(600, "test")
    assert _accuracy(LongerAnswer().compare(test)) == pytest.approx(0.5, abs=0.08)  # ties count as wrong
    words = BagOfWords().fit(_triples(2000, "train"), _triples(300, "dev"))
    assert _accuracy(words.compare(test)) == pytest.approx(0.5, abs=0.062)


def test_same_arguments_same_rows_and_parts_are_disjoint() -> None:
    assert make_preferences(50, 3) == make_preferences(50, 3) != make_preferences(50, 4)
    assert make_preferences(50, 3)[:20] == make_preferences(20, 3)
    splits: tuple[Split, ...] = ("train", "dev", "test")
    prompts = [{row["prompt"] for row in make_preferences(300, 0, split=split)} for split in splits]
    assert not (prompts[0] & prompts[1]) and not (prompts[0] & prompts[2]) and not (prompts[1] & prompts[2])
    assert all(
        split_of(prompt) == split for part, split in zip(prompts, splits, strict=True) for prompt in part
    )


def test_unlabelled_pairs_hide_which_answer_is_better() -> None:
    rows = make_unlabelled(1000, 0)
    first_is_better = np.mean([in_order(row["response_a"]) for row in rows])
    assert first_is_better == pytest.approx(0.5, abs=0.05)
    assert all(in_order(row["response_a"]) != in_order(row["response_b"]) for row in rows)


def test_corpus_has_the_length_asked_for() -> None:
    assert len(make_corpus(12_345, 0)) == 12_345


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("First, a. Then, b. Finally, c.", 1),
        ("First, a. Finally, c. Then, b.", 2 / 3),
        ("Finally, c. First, a. Then, b.", 1 / 3),
        ("At the end, c. After that, b. To begin, a.", 0),
        ("First, a. Finally, c.", 1 / 3),
        ("Something else.", 0),
    ],
)
def test_order_score_counts_pairs_of_steps_in_order(answer: str, score: float) -> None:
    assert order_score(answer) == pytest.approx(score)
    assert in_order(answer) == (score == 1)
