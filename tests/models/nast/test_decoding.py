"""Checks A5 (collapse, greedy) and A9 (beam), brute force, the language model, rescoring, word times."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from nast_cases import A, enumerated_loss, paths_by_label
from torch import Tensor

from eagleray.models.nast.decoding import (
    Hypothesis,
    collapse,
    greedy,
    greedy_hypotheses,
    prefix_beam_search,
    rescore,
    word_times,
)
from eagleray.models.nast.ngram import NgramModel


def random_logits(batch: int, frames: int, vocab_size: int, *, seed: int = 0) -> Tensor:
    return (
        torch.randn(batch, frames, vocab_size, generator=torch.Generator().manual_seed(seed)).mul_(2).double()
    )


@pytest.mark.parametrize(
    ("path", "labels"),
    [
        ([0, 0, 2, 0], [2]),
        ([1, 1, 0, 1], [1, 1]),
        ([1, 1, 1], [1]),
        ([0, 0], []),
        ([3, 0, 3, 3, 0, 2, 2], [3, 3, 2]),
        ([], []),
    ],
)
def test_a5_collapse(path: list[int], labels: list[int]) -> None:
    assert collapse(path) == labels


def test_a5_greedy_on_a_with_its_score() -> None:
    """0.6 · 0.5 · 0.5 · 0.7 along 0 0 2 0; frames beyond the length are not read."""
    padded = torch.cat([A, torch.tensor([[0.0, 9.0, 0.0]]).double()])[None]
    assert greedy(padded, torch.tensor([4])) == [[2]]
    found = greedy_hypotheses(padded, torch.tensor([4]))[0]
    assert found.score == pytest.approx(math.log(0.6 * 0.5 * 0.5 * 0.7), abs=1e-6)
    assert greedy(padded + 3.0, torch.tensor([5])) == [[2, 1]]


def test_a9_exhaustive_search() -> None:
    found = prefix_beam_search(A[None], torch.tensor([4]), width=20)[0]
    expected = [((2,), -1.242021), ((1, 2), -1.554950), ((1,), -1.835085), ((2, 1), -2.276917)]
    for hypothesis, (tokens, score) in zip(found, expected, strict=False):
        assert tuple(hypothesis.tokens) == tokens
        assert hypothesis.score == pytest.approx(score, abs=1e-6)
    assert len(found) == 15
    assert sum(math.exp(h.score) for h in found) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(4))
def test_a9_wide_beams_find_every_label_with_its_probability(seed: int) -> None:
    logits = random_logits(1, 5, 4, seed=seed)
    found = prefix_beam_search(logits, torch.tensor([5]), width=400)[0]
    log_probs = logits[0].log_softmax(-1)
    assert {tuple(h.tokens) for h in found} == set(paths_by_label(log_probs))
    for hypothesis in found:
        assert hypothesis.log_prob == pytest.approx(
            -enumerated_loss(log_probs, tuple(hypothesis.tokens)), abs=1e-9
        )


def slow_beam(log_probs: list[list[float]], *, width: int, candidates: int) -> dict[tuple[int, ...], float]:
    """Textbook prefix beam search with a dictionary from prefix to (ends in blank, ends in label)."""
    beams = {(): (1.0, 0.0)}
    for frame in log_probs:
        p = [math.exp(v) for v in frame]
        allowed = sorted(range(1, len(p)), key=lambda v: -p[v])[:candidates]
        new: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for prefix, (blank, label) in beams.items():
            new[prefix][0] += (blank + label) * p[0]
            if prefix:
                new[prefix][1] += label * p[prefix[-1]]
            for token in set(allowed) | {other[-1] for other in beams if other and other[:-1] == prefix}:
                before = blank if prefix and prefix[-1] == token else blank + label
                new[(*prefix, token)][1] += before * p[token]
        best = sorted(new, key=lambda q: -sum(new[q]))[:width]
        beams = {prefix: (new[prefix][0], new[prefix][1]) for prefix in best}
    return {prefix: math.log(sum(pair)) for prefix, pair in beams.items() if sum(pair)}


@pytest.mark.parametrize(("width", "candidates"), [(1, 1), (3, 2), (5, 7), (8, 40)])
def test_narrow_beams_equal_the_textbook_algorithm_in_a_padded_batch(width: int, candidates: int) -> None:
    logits, lengths = random_logits(3, 12, 8, seed=width), torch.tensor([12, 7, 1])
    found = prefix_beam_search(logits, lengths, width=width, candidates=candidates)
    for clip, length in enumerate(lengths):
        log_probs = logits[clip, :length].log_softmax(-1).tolist()
        expected = slow_beam(log_probs, width=width, candidates=candidates)
        assert [tuple(h.tokens) for h in found[clip]] == sorted(expected, key=lambda p: -expected[p])
        for hypothesis in found[clip]:
            assert hypothesis.score == pytest.approx(expected[tuple(hypothesis.tokens)], abs=1e-9)


def test_impossible_extensions_are_not_taken_for_real_beams() -> None:
    """Tokens with probability 0 at some frames fill the beam with impossible prefixes; sums must still be exact."""
    logits = random_logits(1, 6, 4, seed=5)
    logits[0, [0, 1, 3], [2, 1, 3]] = -torch.inf
    log_probs = logits[0].log_softmax(-1)
    found = prefix_beam_search(logits, torch.tensor([6]), width=60)[0]
    assert len({tuple(h.tokens) for h in found}) == len(found)
    expected = slow_beam(log_probs.tolist(), width=60, candidates=4)
    for hypothesis in found:
        assert hypothesis.score == pytest.approx(expected[tuple(hypothesis.tokens)], abs=1e-9)


def test_beam_beats_greedy_and_computes_in_float32_for_half_precision() -> None:
    logits, lengths = random_logits(4, 20, 10, seed=9), torch.full((4,), 20)
    for beam, path in zip(
        prefix_beam_search(logits, lengths), greedy_hypotheses(logits, lengths), strict=True
    ):
        assert beam[0].score >= path.score
    half = prefix_beam_search(logits.bfloat16(), lengths)
    full = prefix_beam_search(logits.bfloat16().float(), lengths)
    assert [h.tokens for h in half[0]] == [h.tokens for h in full[0]]


def test_language_model_ranks_as_brute_force_does() -> None:
    """Over all labels of A: log P + 0.7 log P_LM + 0.4 per token."""
    lm = NgramModel.train([[1, 2], [1, 2], [2, 1], [1]], order=2, vocab_size=3)
    found = prefix_beam_search(
        A[None], torch.tensor([4]), width=50, language_model=lm, language_weight=0.7, token_bonus=0.4
    )[0]
    expected = {}
    for label in paths_by_label(A):
        fluency = sum(lm.log_prob(token, label[:i]) for i, token in enumerate(label))
        expected[label] = -enumerated_loss(A, label) + 0.7 * fluency + 0.4 * len(label)
    assert [tuple(h.tokens) for h in found] == sorted(expected, key=lambda label: -expected[label])
    for hypothesis in found:
        assert hypothesis.score == pytest.approx(expected[tuple(hypothesis.tokens)], abs=1e-9)
    assert found[0].tokens == [1, 2]  # without the model it is [2]


def test_token_bonus_works_without_a_language_model() -> None:
    found = prefix_beam_search(A[None], torch.tensor([4]), width=20, token_bonus=5.0)[0]
    assert found[0].tokens == [2, 1, 2, 1]  # the only path of a label of four: 0.1 · 0.2 · 0.5 · 0.2
    assert found[0].log_prob == pytest.approx(math.log(0.002))
    assert found[0].score == pytest.approx(math.log(0.002) + 20.0)


def test_ngram_probabilities_by_hand(tmp_path: Path) -> None:
    """Unigrams 1, 2, 1: P(1) = (2 + 2·¼)/(3 + 2) = ½. After 1 comes 2 once: P(2 | 1) = (1 + P(2))/2, P(2) = 0.3."""
    lm = NgramModel.train([[1, 2, 1]], order=2, vocab_size=4)
    assert lm.log_prob(2, [1]) == pytest.approx(math.log((1 + 0.3) / 2))
    assert lm.log_prob(1, [3]) == pytest.approx(math.log(0.5))  # context never seen: unigrams
    for context in ([], [1], [2], [3], [2, 1]):
        assert sum(math.exp(lm.log_prob(token, context)) for token in range(4)) == pytest.approx(1.0)
    lm.save(tmp_path / "lm.json")
    assert NgramModel.load(tmp_path / "lm.json").log_prob(2, [1]) == lm.log_prob(2, [1])


def test_rescoring_by_hand() -> None:
    found = [[Hypothesis([1], -1.0, -1.0), Hypothesis([2], -2.0, -2.0)]]
    again = rescore(found, [[-9.0, -3.0]], weight=0.5)
    assert [(h.tokens, h.score) for h in again[0]] == [([2], -2.5), ([1], -5.0)]
    assert [h.tokens for h in rescore(found, [[-9.0, -3.0]], weight=0.0)[0]] == [[1], [2]]


def test_word_times() -> None:
    timed = word_times(["▁Gu", "ten", "▁Tag"], [(2, 3), (5, 6), (10, 12)], frame_seconds=0.5)
    assert timed == [("Guten", 1.0, 3.0), ("Tag", 5.0, 6.0)]
    assert word_times([], []) == []


def test_errors() -> None:
    with pytest.raises(ValueError, match="`width` is 0 and `candidates` 40; both must be at least 1"):
        prefix_beam_search(A[None], torch.tensor([4]), width=0)
    with pytest.raises(ValueError, match=r"`weight` is 2; it must be in \[0, 1\]"):
        rescore([], [], weight=2)
    with pytest.raises(ValueError, match="`order` is 0 and `vocab_size` 3; both must be at least 1"):
        NgramModel({}, order=0, vocab_size=3)
