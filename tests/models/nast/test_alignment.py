"""Check A6, the best paths of A1 and A2, parity with torchaudio and with enumeration, ties, time stamps."""

from __future__ import annotations

import random

import pytest
import torch
import torchaudio
from nast_cases import SECOND, A, pad_labels, paths_by_label

from eagleray.models.nast.alignment import Alignment, Span, align, required_frames
from eagleray.models.nast.decoding import collapse
from eagleray.models.nast.losses import ctc_sum


def align_all(log_probs: torch.Tensor, labels: list[tuple[int, ...]], *, value: int = 0) -> Alignment:
    targets, counts = pad_labels(labels, value=value)
    size = len(log_probs)
    return align(log_probs.expand(len(labels), -1, -1), torch.full((len(labels),), size), targets, counts)


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_a6_states_and_a1_best_paths(padding: int) -> None:
    labels = [(1, 2), (2, 1), (1, 1), (1,), (1, 2, 1), ()]
    found = align_all(A, labels, value=padding)
    assert found.states_BS.tolist()[:3] == [[1, 2, 3, 4], [0, 0, 1, 3], [1, 2, 2, 3]]
    assert found.labels_BS.tolist() == [
        [1, 0, 2, 0],
        [0, 0, 2, 1],
        [1, 0, 0, 1],
        [1, 0, 0, 0],
        [1, 0, 2, 1],
        [0, 0, 0, 0],
    ]
    scores = [-2.946942, -3.506558, -4.422849, -3.170086, -4.199705, -2.476938]
    torch.testing.assert_close(found.score_B, torch.tensor(scores).double(), atol=1e-6, rtol=0)
    assert found.feasible_B.all()


def test_a1_no_path_for_three_equal_labels_in_four_frames() -> None:
    found = align_all(A, [(1, 1, 1), (1, 2)])
    assert found.feasible_B.tolist() == [False, True]
    assert found.labels_BS[0].tolist() == [0, 0, 0, 0]
    assert found.score_B[0] == -torch.inf
    assert found.spans(0) == []
    assert required_frames(torch.tensor([[1, 1, 1], [1, 2, 2]]), torch.tensor([3, 2])).tolist() == [5, 2]


def test_a2_best_paths() -> None:
    found = align_all(SECOND, [(1, 2, 3), (2, 2), (1, 1, 2)])
    assert found.labels_BS.tolist() == [[1, 2, 0, 3, 3], [2, 2, 0, 2, 0], [1, 0, 1, 2, 0]]
    assert found.score_B[0].item() == pytest.approx(-3.578330, abs=1e-6)


def test_a6_best_path_of_every_label_equals_enumeration() -> None:
    """All label sequences that five random frames over three labels can give, in one padded batch."""
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(5, 4, generator=generator, dtype=torch.float64).log_softmax(-1)
    cases = paths_by_label(log_probs)
    found = align_all(log_probs, list(cases))
    for clip, (label, paths) in enumerate(cases.items()):
        path, score = max(paths, key=lambda pair: pair[1])
        assert tuple(found.labels_BS[clip].tolist()) == path
        assert collapse(found.labels_BS[clip].tolist()) == list(label)
        assert found.score_B[clip].item() == pytest.approx(score, abs=1e-9)


def slow_states(scores: list[list[float]], target: list[int]) -> list[int]:
    """Textbook Viterbi, one cell after another; `max` takes the first of equals: stay, then one step, then skip."""
    size = 2 * len(target) + 1
    extended = [target[s // 2] if s % 2 else 0 for s in range(size)]
    alpha = [scores[0][extended[s]] if s < 2 else -torch.inf for s in range(size)]
    back: list[list[int]] = []
    for frame in scores[1:]:
        origins = []
        for s in range(size):
            options = [s] + [s - 1] * (s >= 1)
            if s % 2 and s >= 3 and extended[s] != extended[s - 2]:
                options.append(s - 2)
            origins.append(max(options, key=lambda o: alpha[o]))
        alpha = [alpha[o] + frame[extended[s]] for s, o in enumerate(origins)]
        back.append(origins)
    state = max([size - 2, size - 1] if target else [0], key=lambda s: alpha[s])
    states = [state]
    for origins in reversed(back):
        states.append(origins[states[-1]])
    return states[::-1]


def test_a6_ties_are_broken_as_the_specification_says() -> None:
    """Scores 0 and −1 make most maxima ties; whole numbers keep them exact."""
    rng = random.Random(0)
    for _ in range(150):
        frames, count = rng.randint(1, 9), rng.randint(0, 3)
        target = [rng.randint(1, 3) for _ in range(count)]
        scores = [[float(-rng.randint(0, 1)) for _ in range(4)] for _ in range(frames)]
        lengths = torch.tensor([frames])
        targets = torch.tensor([target], dtype=torch.long).view(1, count)
        found = align(torch.tensor([scores]), lengths, targets, torch.tensor([count]))
        if found.feasible_B[0]:
            assert found.states_BS[0].tolist() == slow_states(scores, target), (scores, target)


def test_a6_parity_with_torchaudio_and_score_bound() -> None:
    generator = torch.Generator().manual_seed(1)
    lengths, counts = torch.tensor([60, 41, 25, 60]), torch.tensor([12, 9, 12, 1])
    targets = torch.randint(1, 30, (4, 12), generator=generator)
    targets[0, 3:6] = 7  # neighbours that need a blank between them
    log_probs = torch.randn(4, 60, 30, generator=generator).mul_(3).log_softmax(-1)
    found = align(log_probs, lengths, targets, counts)
    for clip, (size, count) in enumerate(zip(lengths, counts, strict=True)):
        alone, alone_count = log_probs[clip : clip + 1, :size], targets[clip : clip + 1, :count]
        path, scores = torchaudio.functional.forced_align(alone, alone_count.int(), blank=0)
        assert found.labels_BS[clip, :size].tolist() == path[0].tolist()
        assert found.labels_BS[clip, size:].eq(0).all()
        assert found.score_B[clip].item() == pytest.approx(scores.sum().item(), abs=1e-3)
        loss = ctc_sum(alone, torch.tensor([size]), alone_count, torch.tensor([count]))
        assert found.score_B[clip].item() <= -loss.item() + 1e-4
        assert [s.end - s.start for s in found.spans(clip)] == [
            s.end - s.start for s in torchaudio.functional.merge_tokens(path[0], scores[0], blank=0)
        ]


def test_spans_tell_equal_neighbours_apart() -> None:
    found = align_all(A, [(1, 1), (2, 1)])
    assert found.spans(0) == [Span(0, 1), Span(3, 4)]
    assert found.spans(1) == [Span(2, 3), Span(3, 4)]


def test_impossible_tokens_do_not_make_nan() -> None:
    log_probs = torch.tensor([[[0.0, -torch.inf], [-torch.inf, 0.0], [0.0, -torch.inf]]])
    found = align(log_probs, torch.tensor([3]), torch.tensor([[1]]), torch.tensor([1]))
    assert found.labels_BS.tolist() == [[0, 1, 0]]
    assert found.score_B.item() == 0.0
