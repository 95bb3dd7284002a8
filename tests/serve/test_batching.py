"""The batcher alone: budget, order, turns, bound, cancellation, failures. No model, no Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest

from eagleray.serve.batching import Batcher, BatcherClosed, QueueFull


class Recorder:
    """Doubles numbers, remembers the batches; `hold()` makes the next batches wait for `release()`."""

    def __init__(self, poison: Sequence[int] = ()):
        self.batches: list[list[int]] = []
        self.poison = set(poison)
        self.running = threading.Event()
        self._open = threading.Event()
        self._open.set()

    def hold(self) -> None:
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.running.set()
        assert self._open.wait(5)
        if self.poison & set(items):
            raise ArithmeticError(f"poisoned: {sorted(self.poison & set(items))}")
        return [2 * item for item in items]


def make(compute: Any, *, cost: int = 100, wait: float = 0.02, pending: int = 1000) -> Batcher[int, int]:
    return Batcher(compute, max_batch_cost=cost, max_wait_s=wait, max_pending=pending)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 10))


async def busy(batcher: Batcher[int, int], recorder: Recorder) -> asyncio.Task[list[int]]:
    """Occupy the worker with one batch, so that what is submitted next has to gather."""
    recorder.hold()
    recorder.running.clear()
    task = asyncio.create_task(batcher.run([0], costs=[1]))
    await asyncio.to_thread(recorder.running.wait, 5)
    return task


def test_results_come_back_in_order_and_concurrent_requests_share_a_batch() -> None:
    async def main() -> None:
        recorder = Recorder()
        async with make(recorder) as batcher:
            results = await asyncio.gather(*(batcher.run([i, i + 10], costs=[1, 1]) for i in range(3)))
        assert results == [[0, 20], [2, 22], [4, 24]]
        assert recorder.batches == [[0, 10, 1, 11, 2, 12]]

    run(main())


def test_a_batch_never_costs_more_than_the_budget() -> None:
    async def main() -> None:
        recorder = Recorder()
        costs = {1: 40, 2: 40, 3: 30, 4: 70, 5: 10}
        async with make(recorder) as batcher:
            await asyncio.gather(*(batcher.run([i], costs=[c]) for i, c in costs.items()))
        assert recorder.batches == [[1, 2], [3, 4], [5]]

    run(main())


def test_an_item_above_the_budget_runs_alone() -> None:
    async def main() -> None:
        recorder = Recorder()
        async with make(recorder) as batcher:
            results = await asyncio.gather(
                *(batcher.run([i], costs=[c]) for i, c in [(1, 10), (2, 500), (3, 10)])
            )
        assert results == [[2], [4], [6]]
        assert recorder.batches == [[1], [2], [3]]

    run(main())


def test_a_full_batch_does_not_wait() -> None:
    async def main() -> None:
        async with make(Recorder(), wait=60) as batcher:
            results = await asyncio.gather(*(batcher.run([i], costs=[50]) for i in range(2)))
        assert results == [[0], [2]]

    run(main())


def test_a_long_request_shares_batches_with_a_short_one_behind_it() -> None:
    """40 items of cost 10, budget 100: without turns the single item behind them would be in the fifth batch."""

    async def main() -> None:
        recorder = Recorder()
        async with make(recorder) as batcher:
            first = await busy(batcher, recorder)
            long = asyncio.create_task(batcher.run(range(100, 140), costs=[10] * 40))
            await asyncio.sleep(0)
            short = asyncio.create_task(batcher.run([7], costs=[10]))
            await asyncio.sleep(0)
            recorder.release()
            assert await short == [14]
            assert not long.done()
            assert await long == [2 * i for i in range(100, 140)]
            await first
        assert 7 in recorder.batches[1]
        assert [len(batch) for batch in recorder.batches] == [1, 10, 10, 10, 10, 1]

    run(main())


def test_items_of_one_request_stand_side_by_side_in_a_batch() -> None:
    async def main() -> None:
        recorder = Recorder()
        async with make(recorder) as batcher:
            await asyncio.gather(
                batcher.run([1, 2, 3, 4], costs=[12] * 4), batcher.run([5, 6, 7, 8], costs=[12] * 4)
            )
        assert recorder.batches == [[1, 2, 3, 4, 5, 6, 7, 8]]

    run(main())


def test_what_does_not_fit_is_refused_at_once_and_room_comes_back() -> None:
    async def main() -> None:
        batcher = make(Recorder(), pending=3)
        with batcher.admit(2):
            with pytest.raises(QueueFull, match="2 needed, 2 of 3 pending") as refusal, batcher.admit(2):
                pass
            assert refusal.value.retry_after_s >= 1
            with batcher.admit(1):
                assert batcher.pending == 3
        assert batcher.pending == 0

    run(main())


def test_retry_after_follows_the_measured_speed() -> None:
    async def main() -> None:
        def slow(items: list[int]) -> list[int]:
            threading.Event().wait(0.05)
            return items

        async with make(slow, pending=100) as batcher:
            await batcher.run([1], costs=[1])
            with batcher.admit(100), pytest.raises(QueueFull) as refusal, batcher.admit(1):
                pass
            assert 5 <= refusal.value.retry_after_s <= 20  # 100 items at 50 ms or a little more each

    run(main())


def test_a_cancelled_request_is_not_computed_and_leaves_no_trace() -> None:
    async def main() -> None:
        recorder = Recorder()
        async with make(recorder) as batcher:
            first = await busy(batcher, recorder)

            async def request(items: list[int]) -> list[int]:
                with batcher.admit(len(items)):
                    return await batcher.run(items, costs=[1] * len(items))

            abandoned, kept = asyncio.create_task(request([1, 2])), asyncio.create_task(request([3]))
            await asyncio.sleep(0.01)
            abandoned.cancel()
            await asyncio.sleep(0.01)
            assert batcher.pending == 1
            recorder.release()
            assert await kept == [6]
            await first
        assert recorder.batches == [[0], [3]]
        assert abandoned.cancelled() and batcher.pending == 0

    run(main())


def test_cancelling_while_the_batch_runs_spares_its_mates() -> None:
    async def main() -> None:
        recorder = Recorder()
        async with make(recorder) as batcher:
            recorder.hold()
            abandoned = asyncio.create_task(batcher.run([1], costs=[1]))
            kept = asyncio.create_task(batcher.run([2], costs=[1]))
            await asyncio.to_thread(recorder.running.wait, 5)
            abandoned.cancel()
            await asyncio.sleep(0)
            recorder.release()
            assert await kept == [4]

    run(main())


def test_a_failure_reaches_exactly_its_request_and_the_batcher_goes_on() -> None:
    async def main() -> None:
        recorder = Recorder(poison=[2])
        async with make(recorder) as batcher:
            good, bad, other = await asyncio.gather(
                batcher.run([1], costs=[1]),
                batcher.run([2, 3], costs=[1, 1]),
                batcher.run([4], costs=[1]),
                return_exceptions=True,
            )
            assert good == [2] and other == [8]
            assert isinstance(bad, ArithmeticError) and str(bad) == "poisoned: [2]"
            assert await batcher.run([5], costs=[1]) == [10]
        assert recorder.batches == [[1, 2, 3, 4], [1], [2, 3], [4], [5]]

    run(main())


def test_too_few_results_are_an_error() -> None:
    async def main() -> None:
        async with make(lambda items: items[1:]) as batcher:
            with pytest.raises(RuntimeError, match="returned 1 results for 2 items"):
                await batcher.run([1, 2], costs=[1, 1])

    run(main())


def test_the_event_loop_answers_while_a_batch_computes() -> None:
    async def main() -> None:
        recorder = Recorder()
        async with make(recorder) as batcher:
            first = await busy(batcher, recorder)
            for _ in range(5):
                await asyncio.sleep(0.001)
            assert not first.done()
            recorder.release()
            assert await first == [0]

    run(main())


def test_closing_fails_what_waits_and_what_comes_later() -> None:
    async def main() -> None:
        recorder = Recorder()
        async with make(recorder) as batcher:
            first = await busy(batcher, recorder)
            waiting = asyncio.create_task(batcher.run([1], costs=[1]))
            await asyncio.sleep(0)
        recorder.release()
        for task in (first, waiting):
            with pytest.raises(BatcherClosed, match="stopped"):
                await task
        with pytest.raises(BatcherClosed, match="not running"):
            await batcher.run([2], costs=[1])
        assert not batcher.alive

    run(main())


def test_no_items_need_no_batch() -> None:
    async def main() -> None:
        recorder = Recorder()
        async with make(recorder) as batcher:
            assert await batcher.run([], costs=[]) == []
        assert recorder.batches == []

    run(main())
