"""Check A19 (BLEU) and the other figures of section 12, by hand."""

from __future__ import annotations

import pytest
import torch

from eagleray.models.nast.metrics import (
    REORDERING_EDGES,
    bleu,
    bleu_estimate,
    by_bucket,
    chrf,
    edit_distance,
    exact_match,
    exact_match_estimate,
    infeasible_share,
    kendall_tau_distance,
    length_ratio,
    word_error_estimate,
    word_error_rate,
)

HYPOTHESES = ["Das ist ein Test .", "Wir gehen nach Hause, heute."]
REFERENCES = ["Das ist ein Test.", "Wir gehen heute nach Hause."]


def test_a19_bleu_with_signature() -> None:
    score, signature = bleu(HYPOTHESES, REFERENCES)
    assert score == pytest.approx(51.2057, abs=1e-4)
    assert signature == "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"
    assert "tok:zh" in bleu(HYPOTHESES, REFERENCES, language="zh").signature


def test_bleu_estimate_sums_counts_as_corpus_bleu_does() -> None:
    found = bleu_estimate(HYPOTHESES, REFERENCES, samples=50)
    assert found.value == pytest.approx(51.2057, abs=1e-4)
    twice = [bleu([h, h], [r, r]).score for h, r in zip(HYPOTHESES, REFERENCES, strict=True)]
    assert found.low == pytest.approx(min(twice), abs=1e-4)  # replicates of one utterance twice
    assert found.high == pytest.approx(max(twice), abs=1e-4)


def test_chrf_of_equal_texts() -> None:
    assert chrf(REFERENCES, REFERENCES).score == pytest.approx(100.0)
    assert "nc:6" in chrf(REFERENCES, REFERENCES).signature


@pytest.mark.parametrize(
    ("hypothesis", "reference", "edits"),
    [
        ("", "abc", 3),
        ("abc", "", 3),
        ("abc", "abc", 0),
        ("kitten", "sitting", 3),
        ("ab", "ba", 2),
        ("xaby", "ab", 2),
    ],
)
def test_edit_distance(hypothesis: str, reference: str, edits: int) -> None:
    assert edit_distance(hypothesis, reference) == edits


def test_word_error_rate_sums_before_it_divides() -> None:
    """1 of 1 and 1 of 3 words wrong: 2/4."""
    assert word_error_rate(["x", "a b"], ["y", "a b c"]) == 0.5
    found = word_error_estimate(["x", "a b"], ["y", "a b c"], samples=100)
    assert (found.value, found.low, found.high) == (0.5, pytest.approx(1 / 3), 1.0)


def test_exact_match_and_length_ratio() -> None:
    assert exact_match(["a  b", "c"], ["a b", "d"]) == 0.5
    found = exact_match_estimate(["a  b", "c"], ["a b", "d"], samples=100)
    assert found == (0.5, 0.0, 1.0)
    assert length_ratio(["a b c", ""], ["a b", "c d"]) == 0.75


def test_infeasible_share_counts_repeats() -> None:
    labels, counts = torch.tensor([[4, 4, 5], [4, 5, 6], [4, 0, 0]]), torch.tensor([3, 3, 1])
    assert infeasible_share(torch.tensor([3, 3, 1]), labels, counts) == pytest.approx(1 / 3)


def test_buckets_by_reordering() -> None:
    taus = [kendall_tau_distance(p) for p in ([0, 1, 2], [0, 2, 1], [2, 1, 0], [1], [])]
    assert taus == [0.0, pytest.approx(1 / 3), 1.0, 0.0, 0.0]
    rows = by_bucket(taus, REORDERING_EDGES, lambda members: float(sum(members)))
    assert rows == [
        {"from": 0.0, "to": 0.0, "count": 3.0, "score": 7.0},
        {"from": 0.3, "to": 1.0, "count": 2.0, "score": 3.0},
    ]


def test_errors() -> None:
    with pytest.raises(ValueError, match="There are 1 hypotheses and 2 references"):
        bleu(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="at least one pair"):
        exact_match([], [])
    with pytest.raises(ValueError, match="The references have no words"):
        word_error_rate(["a"], [""])
