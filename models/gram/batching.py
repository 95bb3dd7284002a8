"""Batches of token sequences: padding, token budgets, and groups that share a prefix.

Pure functions on lists of token ids; they decide how to compute, never what comes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Ids = list[int] | tuple[int, ...]

# A group costs two more forward passes; below this many saved tokens it is not worth them.
MIN_SAVED_TOKENS = 512


def pad_right(sequences: Sequence[Ids], *, pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and attention mask [B, T] (1 = token) of sequences of unequal length."""
    length = max(map(len, sequences))
    ids_BT = torch.full((len(sequences), length), pad_id, dtype=torch.long)
    mask_BT = torch.zeros((len(sequences), length), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids_BT[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask_BT[row, : len(sequence)] = 1
    return ids_BT, mask_BT


def token_batches(
    lengths: Sequence[int], *, max_tokens: int, overhead: int = 0, least_fill: float = 0.0
) -> Iterator[list[int]]:
    """Indices in batches of like length, longest first, of at most `max_tokens` with padding.

    Args:
        lengths: Tokens of each sequence.
        max_tokens: Budget of a batch; a longer sequence gets a batch of its own.
        overhead: Tokens that each row costs besides its own, for example a cached prefix.
        least_fill: Share of the longest sequence of a batch that the shortest one has at least; what is left of it is
            the most padding there can be.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        too_many = batch and (len(batch) + 1) * (lengths[batch[0]] + overhead) > max_tokens
        if too_many or (batch and lengths[index] < least_fill * lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@dataclass(frozen=True)
class PrefixGroup:
    """Sequences, by index, whose first `prefix_length` tokens are the same."""

    members: list[int]
    prefix_length: int


def prefix_groups(
    sequences: Sequence[Ids], *, min_saved: int = MIN_SAVED_TOKENS
) -> tuple[list[PrefixGroup], list[int]]:
    """Split distinct sequences into groups that share a prefix worth computing once, and the rest.

    In sorted order the sequences with the longest common prefixes are neighbours. A group takes its next
    neighbour as long as that does not lower the number of tokens it saves, (members - 1) * prefix length.

    Returns:
        The groups that save at least `min_saved` tokens, and the indices in none of them.
    """
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    groups: list[PrefixGroup] = []
    rest: list[int] = []

    def close(members: list[int], prefix: int) -> None:
        if (len(members) - 1) * prefix >= max(1, min_saved):
            groups.append(PrefixGroup(members, prefix))
        else:
            rest.extend(members)

    members: list[int] = []
    prefix = 0
    for index in order:
        if members:
            # Each sequence keeps a token of its own: its last position is where the label is read.
            longest = len(sequences[index]) - 1 if len(members) == 1 else prefix
            limit = min(longest, len(sequences[members[0]]) - 1, len(sequences[index]) - 1)
            shared = common_prefix(sequences[members[-1]], sequences[index], limit)
            if shared and len(members) * shared >= (len(members) - 1) * prefix:
                members.append(index)
                prefix = shared
                continue
            close(members, prefix)
        members, prefix = [index], 0
    close(members, prefix)
    return groups, rest


def common_prefix(first: Ids, second: Ids, limit: int) -> int:
    """Number of equal leading tokens, at most `limit`."""
    low, high = 0, min(limit, len(first), len(second))
    # Slices compare at C speed; a Python loop over thousands of long prompts would not.
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
