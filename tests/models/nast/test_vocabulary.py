"""The vocabulary: ids of the special symbols, round trips, sizes that the text cannot fill."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from eagleray.models.nast.vocabulary import Kind, Vocabulary, ctc_length

TEXTS = [
    "sieben und vierzig",
    "drei hundert ein und zwanzig",
    "one two",
    "fünf",
    "日本語 🙂",
    "a\u2028b\x00c",
    "",
]


@pytest.mark.parametrize("kind", ["unigram", "bpe", "word"])
def test_round_trip_and_ids(tmp_path: Path, kind: Kind) -> None:
    vocabulary = Vocabulary.train(TEXTS * 3, size=60, kind=kind)
    for text in TEXTS[:5]:
        ids = vocabulary.encode(text)
        assert min(ids) > 3 and vocabulary.decode(ids) == text
        assert vocabulary.decode([0, *ids, 2, 1]) == text  # blank, end and padding are not text
    assert 3 in vocabulary.encode("☃")
    vocabulary.save(tmp_path / "v.model")
    again = Vocabulary.load(tmp_path / "v.model")
    assert len(again) == len(vocabulary) and again.encode(TEXTS[0]) == vocabulary.encode(TEXTS[0])
    assert Vocabulary.train(TEXTS * 3, size=60, kind=kind).encode(TEXTS[1]) == vocabulary.encode(TEXTS[1])


@pytest.mark.parametrize("kind", ["unigram", "bpe", "word"])
def test_a_size_that_the_text_cannot_fill_is_lowered_and_said(
    kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        vocabulary = Vocabulary.train(TEXTS, size=5000, kind=kind)
    assert f"allows a vocabulary of {len(vocabulary)} pieces, not 5000" in caplog.text


def test_what_cannot_be_learnt_or_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="all transcripts and targets are empty"):
        Vocabulary.train(["", "  "])
    with pytest.raises(ValueError, match=r"has 10 pieces, .* alone need \d+\. Raise `vocabulary.size`"):
        Vocabulary.train(TEXTS, size=10)
    with pytest.raises(ValueError, match="no such vocabulary file"):
        Vocabulary.load(tmp_path / "none.model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Vocabulary(b"\x80\x04junk")


def test_ctc_length_by_hand() -> None:
    assert [ctc_length(ids) for ids in ([], [5], [5, 6], [5, 5], [5, 5, 5, 6, 6])] == [0, 1, 2, 3, 8]
