"""Batches as a pure function of (seed, step): whatever the number of workers, and with nothing to save.

The examples form one endless stream, epoch after epoch, each epoch its own permutation; batch `step` is the
stream from `step * batch_size` on. Every batch is full: one at an epoch's border takes its first examples
from the old epoch and the rest from the new. Inside an epoch examples of like length share a batch, which
saves padding while the order of the batches stays random. With a `micro_batch_length` the forward passes of a step hold as many
examples as that many padded positions allow: what changes is how a batch is cut, never which examples it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


class BatchSampler:
    """Deals the examples of a training run out to batches, ranks and micro-batches.

    Args:
        lengths: Length (in tokens, frames, ...) of every example; its index is the example's name here.
        batch_size: Examples of one optimiser step, over all ranks.
        micro_batch_size: Examples of one forward pass of one rank; with `micro_batch_length`, at most.
        seed: Seed of all permutations.
        bucket_batches: Examples are batched by length within pools of this many batches; 0 switches that off.
        micro_batch_length: Largest padded length of one forward pass, examples times the longest of them; a longer
            example is alone in its pass. All ranks make equally many passes.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        bucket_batches: int = 50,
        micro_batch_length: int | None = None,
    ) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        if self._lengths.size == 0:
            raise ValueError("`lengths` is empty: there is no example to batch.")
        if self._lengths.min() < 1:
            index = int(self._lengths.argmin())
            raise ValueError(
                f"Example {index} has length {self._lengths[index]}; every length must be at least 1."
            )
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("micro_batch_size", micro_batch_size, 1),
            ("seed", seed, 0),
            ("bucket_batches", bucket_batches, 0),
            ("micro_batch_length", micro_batch_length, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"`{name}` is {value}; it must be at least {least}.")
        self._batch_size = batch_size
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        self._bucket_batches = bucket_batches
        self._micro_batch_length = micro_batch_length
        self._epochs: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of one optimiser step; the same for every number of ranks."""
        if step < 0:
            raise ValueError(f"`step` is {step}; steps count from 0.")
        size = self._lengths.size
        position, end = step * self._batch_size, (step + 1) * self._batch_size
        parts = []
        while position < end:
            epoch, offset = divmod(position, size)
            part = self._epoch_order(epoch)[offset : offset + end - position]
            parts.append(part)
            position += part.size
        return np.concatenate(parts).tolist()

    def micro_batches(self, step: int, *, rank: int, world_size: int) -> list[list[int]]:
        """One rank's share of a batch: micro-batches of like length, the longest first.

        The batch is sorted by length and dealt out in turn, so that all ranks have the same work at the same
        time; the shares of all ranks together are exactly `batch(step)`.
        """
        limit = self._micro_batch_length
        names, values, per_pass = "`world_size`", f"{world_size}", world_size
        if limit is None:
            per_pass = world_size * self._micro_batch_size
            names += " x `micro_batch_size`"
            values += f" x {self._micro_batch_size} = {per_pass}"
        if world_size < 1 or self._batch_size % per_pass:
            raise ValueError(
                f"`batch_size` is {self._batch_size}; it must be a multiple of {names} = {values}."
            )
        if not 0 <= rank < world_size:
            raise ValueError(
                f"`rank` is {rank}; with `world_size` {world_size} it must be 0 to {world_size - 1}."
            )
        batch = np.asarray(self.batch(step))
        by_length = batch[np.argsort(-self._lengths[batch], kind="stable")]
        share = by_length[rank::world_size]
        # Cut by the longest of all ranks, which rank 0 holds, so that all ranks cut at the same places.
        pieces = cut_by_length(self._lengths[by_length[::world_size]], self._micro_batch_size, limit)
        return [share[piece].tolist() for piece in pieces]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            # Steps ask in order, and a batch lies in one epoch or on one border: two epochs are enough.
            self._epochs = {kept: order for kept, order in self._epochs.items() if kept == epoch - 1}
            self._epochs[epoch] = self._order_of(epoch)
        return self._epochs[epoch]

    def _order_of(self, epoch: int) -> np.ndarray:
        """The epoch's permutation, with its whole batches gathered by length and shuffled."""
        size, batch_size = self._lengths.size, self._batch_size
        order = _permutation(size, self._seed, epoch, 0)
        head = -epoch * size % batch_size  # these complete the batch that the last epoch began
        batches = (size - head) // batch_size
        if self._bucket_batches == 0 or batches < 1:
            return order
        tail = head + batches * batch_size  # those from here on begin the batch that the next epoch completes
        middle = order[head:tail]
        pool = self._bucket_batches * batch_size
        for start in range(0, middle.size, pool):
            part = middle[start : start + pool]
            middle[start : start + pool] = part[np.argsort(self._lengths[part], kind="stable")]
        shuffled = middle.reshape(batches, batch_size)[_permutation(batches, self._seed, epoch, 1)]
        return np.concatenate([order[:head], shuffled.ravel(), order[tail:]])


def cut_by_length(longest_first: Sequence[int] | np.ndarray, size: int, length: int | None) -> list[slice]:
    """Cut examples, the longest first, into pieces of at most `size`, and of at most `length` when padded.

    >>> cut_by_length([9, 5, 4, 1], size=3, length=10)  # the first alone; two of length 5; the rest
    [slice(0, 1, None), slice(1, 3, None), slice(3, 4, None)]
    """
    pieces, start = [], 0
    while start < len(longest_first):
        count = size if length is None else min(size, max(1, length // int(longest_first[start])))
        pieces.append(slice(start, min(start + count, len(longest_first))))
        start += count
    return pieces


def padding_share(micro_batches: Iterable[Sequence[int]], lengths: Sequence[int] | np.ndarray) -> float:
    """Share of positions that hold padding when each micro-batch is padded to its longest example.

    >>> padding_share([[0, 1], [2]], [3, 1, 2])  # 2 of 3 + 3 + 2 positions
    0.25
    """
    sizes = [np.asarray(lengths)[list(micro_batch)] for micro_batch in micro_batches]
    filled = sum(int(size.sum()) for size in sizes)
    padded = sum(int(size.max()) * size.size for size in sizes)
    return 1 - filled / padded


def _permutation(size: int, *key: int) -> np.ndarray:
    """A permutation from the raw bits of PCG64, the part of NumPy's generators that no release may change."""
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(bits, kind="stable")
