"""Padding, token budgets and prefix groups."""

from __future__ import annotations

import random

import torch

from eagleray.models.gram.batching import common_prefix, pad_right, prefix_groups, token_batches


def test_pad_right() -> None:
    ids, mask = pad_right([[5, 6, 7], [8]], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == torch.long


def test_token_batches_by_hand() -> None:
    assert list(token_batches([3, 9, 4, 2], max_tokens=8)) == [[1], [2, 0], [3]]
    assert list(token_batches([3, 9, 4, 2], max_tokens=8, overhead=1)) == [[1], [2], [0, 3]]
    assert list(token_batches([], max_tokens=8)) == []


def test_token_batches_stay_in_budget_and_lose_nothing() -> None:
    lengths = [random.Random(0).randint(1, 60) for _ in range(200)]
    batches = list(token_batches(lengths, max_tokens=100))
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    for batch in batches:
        assert len(batch) * max(lengths[i] for i in batch) <= 100 or len(batch) == 1


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4], 9) == 2
    assert common_prefix([1, 2, 3], [1, 2, 3], 2) == 2
    assert common_prefix([1], [2], 9) == 0
    assert common_prefix([], [2], 9) == 0


def test_groups_by_prompt_and_leaves_strangers_alone() -> None:
    first, second = list(range(100, 140)), list(range(200, 230))
    sequences = [[*first, 1], [*second, 1, 1], [7, 8, 9], [*first, 2, 2], [*second, 2], [*first, 3]]
    groups, rest = prefix_groups(sequences, min_saved=10)
    assert sorted((sorted(group.members), group.prefix_length) for group in groups) == [
        ([0, 3, 5], 40),
        ([1, 4], 30),
    ]
    assert rest == [2]


def test_a_short_prefix_of_all_loses_against_long_prefixes_of_pairs_and_wins_against_short_ones() -> None:
    def prompts(own: int) -> list[list[int]]:
        return [[*range(20), *([100 + p] * own), answer] for p in range(6) for answer in (1, 2)]

    groups, rest = prefix_groups(prompts(own=100), min_saved=1)
    assert sorted(group.prefix_length for group in groups) == [120] * 6 and not rest
    groups, rest = prefix_groups(prompts(own=2), min_saved=1)
    assert [(len(group.members), group.prefix_length) for group in groups] == [(12, 20)] and not rest


def test_every_member_keeps_a_token_of_its_own() -> None:
    groups, _ = prefix_groups([[1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 5]], min_saved=1)
    assert [group.prefix_length for group in groups] == [2]


def test_groups_that_save_little_are_not_made() -> None:
    sequences = [[*range(50), 1], [*range(50), 2]]
    assert prefix_groups(sequences, min_saved=51) == ([], [0, 1])
    assert len(prefix_groups(sequences, min_saved=50)[0]) == 1
    assert prefix_groups([[1], [2]], min_saved=0) == ([], [0, 1])
    assert prefix_groups([], min_saved=1) == ([], [])
