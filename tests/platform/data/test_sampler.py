import math
import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from eagleray.platform.data.sampler import BatchSampler, cut_by_length, padding_share


def lengths_of(size, seed=0):
    return np.random.default_rng(seed).lognormal(4, 0.8, size).astype(int) + 1


def sampler_of(lengths, *, batch_size=8, micro_batch_size=2, seed=0, bucket_batches=4):
    return BatchSampler(
        lengths,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        seed=seed,
        bucket_batches=bucket_batches,
    )


def random_cases(count):
    rng = np.random.default_rng(7)
    for _ in range(count):
        size, batch_size = int(rng.integers(1, 60)), int(rng.integers(1, 17))
        options = {"seed": int(rng.integers(0, 5)), "bucket_batches": int(rng.integers(0, 4))}
        yield lengths_of(size, int(rng.integers(100))), batch_size, options


def test_every_example_comes_once_in_every_epoch():
    for lengths, batch_size, options in random_cases(100):
        sampler = sampler_of(lengths, batch_size=batch_size, micro_batch_size=1, **options)
        size = len(lengths)
        steps = math.lcm(size, batch_size) // batch_size  # the fewest steps that end with an epoch
        stream = [index for step in range(steps) for index in sampler.batch(step)]
        assert len(stream) == steps * batch_size
        for start in range(0, len(stream), size):
            assert sorted(stream[start : start + size]) == list(range(size))


def test_epochs_differ_and_so_do_seeds():
    lengths = lengths_of(40)
    sampler = sampler_of(lengths)
    epochs = [[i for step in range(5 * e, 5 * e + 5) for i in sampler.batch(step)] for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert sampler.batch(0) != sampler_of(lengths, seed=1).batch(0)


def test_any_step_can_be_asked_in_any_order():
    for lengths, batch_size, options in random_cases(40):
        sampler = sampler_of(lengths, batch_size=batch_size, micro_batch_size=1, **options)
        straight = [sampler.batch(step) for step in range(20)]
        for step in (13, 2, 19, 0, 7):
            resumed = sampler_of(lengths, batch_size=batch_size, micro_batch_size=1, **options)
            assert resumed.batch(step) == straight[step] == sampler.batch(step)
        assert pickle.loads(pickle.dumps(sampler)).batch(5) == straight[5]


def test_shares_of_all_ranks_are_the_batch_for_every_world_size():
    for lengths, _, options in random_cases(40):
        sampler = sampler_of(lengths, batch_size=24, micro_batch_size=2, **options)
        for step in range(4):
            batch = Counter(sampler.batch(step))
            for world_size in (1, 2, 3, 4, 6, 12):
                shares = [
                    sampler.micro_batches(step, rank=r, world_size=world_size) for r in range(world_size)
                ]
                assert Counter(i for share in shares for micro in share for i in micro) == batch
                assert {len(micro) for share in shares for micro in share} == {2}
                assert {len(share) for share in shares} == {12 // world_size}


def test_micro_batches_hold_like_lengths_longest_first_alike_on_all_ranks():
    lengths = lengths_of(200)
    sampler = sampler_of(lengths, batch_size=32, micro_batch_size=4)
    shares = [sampler.micro_batches(3, rank=rank, world_size=2) for rank in range(2)]
    for share in shares:
        spans = [(lengths[micro].max(), lengths[micro].min()) for micro in share]
        assert all(shortest >= longest for (_, shortest), (longest, _) in pairwise(spans))
    work = [[lengths[micro].max() for micro in share] for share in shares]
    for i, (mine, theirs) in enumerate(zip(*work, strict=True)):
        assert theirs <= mine
        assert i == 3 or work[0][i + 1] <= theirs  # never further apart than neighbours in the sorted batch


def test_share_by_hand():
    # One epoch is one batch, so the order of the batch does not matter: by length 3 2 0 1, dealt to two ranks.
    sampler = sampler_of([5, 1, 7, 9], batch_size=4, micro_batch_size=1)
    assert sampler.micro_batches(0, rank=0, world_size=2) == [[3], [0]]
    assert sampler.micro_batches(0, rank=1, world_size=2) == [[2], [1]]


@pytest.mark.parametrize("size", [1600, 1613])
def test_bucketing_saves_padding_and_mixes_lengths_over_time(size):
    lengths = lengths_of(size)
    shares, means = {}, {}
    for bucket_batches in (0, 10, 50):
        sampler = sampler_of(lengths, batch_size=16, micro_batch_size=8, bucket_batches=bucket_batches)
        steps = range(3 * size // 16)
        micro_batches = [
            micro for step in steps for micro in sampler.micro_batches(step, rank=0, world_size=1)
        ]
        shares[bucket_batches] = padding_share(micro_batches, lengths)
        means[bucket_batches] = [float(lengths[sampler.batch(step)].mean()) for step in steps]
    assert shares[0] > 0.45
    assert shares[10] < 0.16
    assert shares[50] < 0.05
    # Neighbouring batches are no more alike than any two: the order of the batches is random.
    bucketed = np.array(means[50])
    assert abs(np.corrcoef(bucketed[:-1], bucketed[1:])[0, 1]) < 0.25


def test_bucketing_keeps_the_batch_at_an_epochs_border_full():
    sampler = sampler_of(lengths_of(10), batch_size=4, micro_batch_size=4, bucket_batches=1)
    epochs = [i for step in range(5) for i in sampler.batch(step)]
    assert sorted(epochs[:10]) == sorted(epochs[10:]) == list(range(10))


def test_more_batch_than_data_runs_over_several_epochs():
    sampler = sampler_of([3, 4, 5], batch_size=8, micro_batch_size=8)
    assert Counter(sampler.batch(0)) + Counter(sampler.batch(1)) + Counter(sampler.batch(2)) == Counter(
        {0: 8, 1: 8, 2: 8}
    )


def test_order_must_not_change_between_releases():
    """A resumed run has to see the data in the order of its start, also after an update."""
    sampler = sampler_of(range(1, 11), batch_size=4, micro_batch_size=2, seed=3, bucket_batches=2)
    assert [sampler.batch(step) for step in range(3)] == [[5, 6, 7, 9], [0, 1, 3, 4], [8, 2, 0, 6]]


def test_padding_share_by_hand():
    assert padding_share([[0, 1], [2]], [4, 2, 6]) == pytest.approx(1 - 12 / 14)
    assert padding_share([[0, 0]], [4]) == 0


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([], {}, "`lengths` is empty: there is no example to batch"),
        ([3, 0, 2], {}, "Example 1 has length 0; every length must be at least 1"),
        ([3], {"batch_size": 0}, "`batch_size` is 0; it must be at least 1"),
        ([3], {"micro_batch_size": 0}, "`micro_batch_size` is 0"),
        ([3], {"seed": -1}, "`seed` is -1; it must be at least 0"),
        ([3], {"bucket_batches": -1}, "`bucket_batches` is -1"),
    ],
)
def test_impossible_arguments(lengths, options, message):
    with pytest.raises(ValueError, match=message):
        sampler_of(lengths, **options)


def test_impossible_shares():
    sampler = sampler_of(lengths_of(20), batch_size=8, micro_batch_size=2)
    with pytest.raises(ValueError, match=r"`batch_size` is 8; it must be a multiple of .* = 3 x 2 = 6"):
        sampler.micro_batches(0, rank=0, world_size=3)
    with pytest.raises(ValueError, match="`rank` is 2; with `world_size` 2 it must be 0 to 1"):
        sampler.micro_batches(0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="`step` is -1; steps count from 0"):
        sampler.batch(-1)


def test_a_million_examples_are_quick():
    sampler = sampler_of(lengths_of(1_000_000), batch_size=64, micro_batch_size=8, bucket_batches=50)
    built = [sampler.batch(step) for step in range(50)]
    assert sum(map(len, built)) == 3200


def test_no_more_than_two_epochs_are_held_in_memory():
    sampler = sampler_of(lengths_of(11))
    for step in range(50):
        sampler.batch(step)
        assert len(sampler._epochs) <= 2


def test_a_length_limit_cuts_the_same_batches_at_the_same_places_on_all_ranks():
    for lengths, _, options in random_cases(30):
        plain = BatchSampler(lengths, batch_size=24, micro_batch_size=24, **options)
        limited = BatchSampler(lengths, batch_size=24, micro_batch_size=5, micro_batch_length=400, **options)
        for step in range(3):
            assert limited.batch(step) == plain.batch(step)
            for world_size in (1, 2, 3):
                shares = [
                    limited.micro_batches(step, rank=r, world_size=world_size) for r in range(world_size)
                ]
                dealt = Counter(i for share in shares for micro in share for i in micro)
                assert dealt == Counter(plain.batch(step))
                assert len({tuple(len(micro) for micro in share) for share in shares}) == 1
                for micro in (micro for share in shares for micro in share):
                    assert len(micro) <= 5
                    assert len(micro) == 1 or len(micro) * lengths[micro].max() <= 400


def test_cutting_by_length_by_hand():
    assert cut_by_length([9, 5, 4, 1], size=3, length=10) == [slice(0, 1), slice(1, 3), slice(3, 4)]
    assert cut_by_length([9, 5, 4, 1], size=3, length=None) == [slice(0, 3), slice(3, 4)]
    assert cut_by_length([99], size=3, length=10) == [slice(0, 1)]  # too long for the limit: alone
    assert cut_by_length([], size=3, length=10) == []


def test_a_length_limit_asks_for_batches_that_the_ranks_can_share():
    sampler = BatchSampler([3] * 8, batch_size=8, micro_batch_size=3, seed=0, micro_batch_length=6)
    assert [len(micro) for micro in sampler.micro_batches(0, rank=0, world_size=2)] == [2, 2]
    with pytest.raises(ValueError, match="must be a multiple of `world_size` = 3"):
        sampler.micro_batches(0, rank=0, world_size=3)
    with pytest.raises(ValueError, match="`micro_batch_length` is 0; it must be at least 1"):
        BatchSampler([3], batch_size=8, micro_batch_size=1, seed=0, micro_batch_length=0)
