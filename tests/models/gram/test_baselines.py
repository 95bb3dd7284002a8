"""Baselines without a language model: what they see, what they cannot see, and what they reach on real data."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from eagleray.models.gram.baselines import REGULARISATION, BagOfWords, LongerAnswer
from eagleray.models.gram.judge import Pair

HH_HARMLESS = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "hh_harmless"


def _accuracy(scorer: LongerAnswer | BagOfWords, pairs: list[Pair]) -> float:
    return float(np.mean([c.p_a > 0.5 for c in scorer.compare(pairs)]))


def _polite_pairs(n: int, seed: int) -> list[Pair]:
    """The better answer says please; everything else is drawn alike for both."""
    rng = random.Random(seed)
    words = "the a dog cat house runs sleeps today tomorrow slowly fast red blue".split()  # noqa: SIM905

    def answer(word: str) -> str:
        drawn = rng.choices(words, k=rng.randint(3, 8))
        drawn.insert(rng.randrange(len(drawn)), word)
        return " ".join(drawn)

    return [(f"prompt {i}", answer("please"), answer("now")) for i in range(n)]


def test_longer_answer_by_hand() -> None:
    """p = (1 + n_a) / (2 + n_a + n_b), from the log ratio of lengths as a margin."""
    longer, shorter, equal = LongerAnswer().compare(
        [("q", "a" * 9, "b" * 4), ("q", "", "b"), ("q", "ab", "cd")]
    )
    assert longer.p_a == pytest.approx(10 / 15) and longer.consistent
    assert longer.delta1 == pytest.approx(math.log(2)) == -longer.delta2
    assert shorter.p_a == pytest.approx(1 / 3)
    assert equal.p_a == 0.5


def test_bag_of_words_finds_the_word_that_decides() -> None:
    scorer = BagOfWords().fit(_polite_pairs(120, 0), _polite_pairs(40, 1))
    assert _accuracy(scorer, _polite_pairs(100, 2)) == 1.0
    assert scorer.model is not None and scorer.model.C in REGULARISATION


def test_bag_of_words_has_no_favourite_slot() -> None:
    scorer = BagOfWords().fit(_polite_pairs(60, 0), _polite_pairs(20, 1))
    pairs = _polite_pairs(20, 2)
    forth, back = scorer.compare(pairs), scorer.compare([(prompt, b, a) for prompt, a, b in pairs])
    assert [c.p_a for c in forth] == pytest.approx([1 - c.p_a for c in back], abs=1e-12)
    assert all(c.consistent and c.p_order1 == c.p_order2 for c in forth)
    (same,) = scorer.compare([("q", "please", "please")])
    assert same.p_a == 0.5


def test_bag_of_words_ignores_the_prompt() -> None:
    scorer = BagOfWords().fit(_polite_pairs(60, 0), _polite_pairs(20, 1))
    one, other = scorer.compare(
        [("please", "a dog please", "a dog now"), ("now", "a dog please", "a dog now")]
    )
    assert one == other


def test_regularisation_is_chosen_by_the_dev_set() -> None:
    """Dev labels that contradict the training labels are hurt least by the weakest weights."""
    against = [(prompt, b, a) for prompt, a, b in _polite_pairs(40, 1)]
    weak = BagOfWords().fit(_polite_pairs(120, 0), against)
    strong = BagOfWords().fit(_polite_pairs(120, 0), _polite_pairs(40, 1))
    assert weak.model is not None and strong.model is not None
    assert (weak.model.C, strong.model.C) == (min(REGULARISATION), max(REGULARISATION))


def test_an_unfitted_bag_of_words_is_refused() -> None:
    with pytest.raises(ValueError, match="call `fit` first"):
        BagOfWords().compare([("q", "a", "b")])


@pytest.mark.skipif(not HH_HARMLESS.is_dir(), reason="no real data in ../shared/data/hh_harmless")
def test_hh_harmless_reaches_the_known_figures() -> None:
    """A bag of words reaches about 0.61 on the test part, and the longer answer is chosen in 45 % of pairs."""
    parts = {}
    for part in ("train", "dev", "test"):
        rows = map(json.loads, (HH_HARMLESS / f"{part}.jsonl").read_text(encoding="utf-8").splitlines())
        parts[part] = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    words = BagOfWords().fit(parts["train"], parts["dev"])
    assert _accuracy(words, parts["test"]) == pytest.approx(0.61, abs=0.02)
    assert _accuracy(LongerAnswer(), parts["train"]) == pytest.approx(0.45, abs=0.01)
