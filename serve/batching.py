"""Dynamic batching across requests, by cost (tokens) instead of by count.

Requests arrive one at a time, a model is fast on batches, and the size that matters is tokens. A `Batcher` collects
items from concurrent requests until a batch costs `max_batch_cost` or the oldest item has waited `max_wait_s`, and
runs it in one worker thread, so that the event loop goes on answering. While a batch runs, the next one gathers.

Why not `serve.batch(batch_size_fn=...)` of Ray Serve 2.60 (read in its source): its queue has no bound; an item that
does not fit goes to the *back* of the queue; an item above the budget is an error; cancelled items are computed all
the same; one bad item fails every request of its batch; and each item is its own call, so that a ranking of n answers
cannot hand over a round at once. What this class promises instead:

- **Bounded.** A request is admitted with the number of items it will need in all, or refused at once with the time
  after which a retry makes sense. An admitted request is never refused half-way.
- **Fair.** Requests wait in one line and take turns; a turn is a quarter of a batch, so a ranking with hundreds of
  comparisons delays a single comparison by a batch or two, not by its whole length. Nobody overtakes.
- **Abandoned work is dropped.** Cancelling `run` (the client went away, the time limit passed) takes its items out.
- **Failures stay home.** If a batch fails, its requests are run again one by one; only those that fail alone fail.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

from eagleray.serve.metrics import batch_computed

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

_TURNS_PER_BATCH = 4
_LONGEST_RETRY_S = 600


class QueueFull(Exception):
    """A request that was not admitted."""

    def __init__(self, *, needed: int, pending: int, limit: int, retry_after_s: int):
        super().__init__(f"{needed} needed, {pending} of {limit} pending")
        self.needed, self.pending, self.limit, self.retry_after_s = needed, pending, limit, retry_after_s


class BatcherClosed(Exception):
    """The batcher shut down before the items were computed."""


class _Submission(Generic[Item, Result]):
    """The items of one `run` call: `next` is the first that no batch has taken yet."""

    def __init__(
        self, items: Sequence[Item], costs: Sequence[int], future: asyncio.Future[list[Result]], now: float
    ):
        self.items, self.costs, self.future, self.arrived = items, costs, future, now
        self.next = 0
        self.results: dict[int, Result] = {}

    def accept(self, index: int, result: Result) -> None:
        self.results[index] = result
        if len(self.results) == len(self.items) and not self.future.done():
            self.future.set_result([self.results[i] for i in range(len(self.items))])

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Batcher(Generic[Item, Result]):
    """Runs items of concurrent requests in shared batches; an async context manager.

    Args:
        compute: Called in the worker thread with the items of a batch; returns one result an item, in order.
        max_batch_cost: Largest summed cost of a batch. A dearer item runs alone.
        max_wait_s: How long the oldest item may wait for company.
        max_pending: Items admitted and not finished, over all requests.

    Example:
        with batcher.admit(2):
            first, second = await batcher.run(["a", "b"], costs=[10, 12])
    """

    def __init__(
        self,
        compute: Callable[[list[Item]], Sequence[Result]],
        *,
        max_batch_cost: int,
        max_wait_s: float,
        max_pending: int,
    ):
        self._compute = compute
        self._max_batch_cost = max_batch_cost
        self._max_wait_s = max_wait_s
        self._max_pending = max_pending
        self._line: deque[_Submission[Item, Result]] = deque()
        self._changed = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batcher")
        self._pending = 0
        self._seconds_per_item = 0.0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Batcher[Item, Result]:
        self._task = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def alive(self) -> bool:
        """Whether submitted items will be computed; false before the start and after the end."""
        return self._task is not None and not self._task.done()

    @property
    def pending(self) -> int:
        """Items admitted and not yet given back."""
        return self._pending

    @contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Reserve room for the `count` items that one request will run in all its rounds.

        Raises:
            QueueFull: They do not fit beside those pending.
        """
        if self._pending + count > self._max_pending:
            raise QueueFull(
                needed=count,
                pending=self._pending,
                limit=self._max_pending,
                retry_after_s=self._retry_after_s(),
            )
        self._pending += count
        try:
            yield
        finally:
            self._pending -= count

    async def run(self, items: Sequence[Item], *, costs: Sequence[int]) -> list[Result]:
        """Results of `items`, in order. Call it within `admit`; cancelling it withdraws the items.

        Raises:
            BatcherClosed: The batcher is not running, or stopped meanwhile.
            Exception: What `compute` raised on these items.
        """
        if not self.alive:
            raise BatcherClosed("the batcher is not running")
        if not items:
            return []
        loop = asyncio.get_running_loop()
        submission = _Submission[Item, Result](items, costs, loop.create_future(), loop.time())
        self._line.append(submission)
        self._changed.set()
        try:
            return await submission.future
        finally:
            if submission in self._line:
                self._line.remove(submission)

    def _retry_after_s(self) -> int:
        return min(max(1, math.ceil(self._pending * self._seconds_per_item)), _LONGEST_RETRY_S)

    async def _serve(self) -> None:
        in_flight: list[tuple[_Submission[Item, Result], int]] = []
        try:
            while True:
                await self._gather()
                in_flight = self._take_batch()
                await self._run_batch(in_flight)
        finally:
            closed = BatcherClosed("the batcher stopped")
            for submission in [*self._line, *(submission for submission, _ in in_flight)]:
                submission.fail(closed)

    async def _gather(self) -> None:
        """Return when a batch is full or its oldest item has waited long enough."""
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            patience = None
            if self._line:
                waiting_cost = sum(sum(s.costs[s.next :]) for s in self._line)
                patience = min(s.arrived for s in self._line) + self._max_wait_s - loop.time()
                if waiting_cost >= self._max_batch_cost or patience <= 0:
                    return
            try:
                await asyncio.wait_for(self._changed.wait(), patience)
            except TimeoutError:
                pass

    def _take_batch(self) -> list[tuple[_Submission[Item, Result], int]]:
        """The next items in turn, as (submission, index), within the budget; at least one if any waits."""
        batch: list[tuple[_Submission[Item, Result], int]] = []
        room = self._max_batch_cost
        while self._line:
            submission = self._line[0]
            turn = self._max_batch_cost // _TURNS_PER_BATCH
            while submission.next < len(submission.items) and turn > 0:
                cost = submission.costs[submission.next]
                if batch and cost > room:
                    return batch
                batch.append((submission, submission.next))
                submission.next += 1
                room -= cost
                turn -= cost
            self._line.popleft()
            if submission.next < len(submission.items):
                self._line.append(submission)
        return batch

    async def _run_batch(self, batch: list[tuple[_Submission[Item, Result], int]]) -> None:
        # Items of one request side by side: they share a prompt, and models reuse shared prefixes.
        groups: dict[_Submission[Item, Result], list[int]] = {}
        for submission, index in batch:
            groups.setdefault(submission, []).append(index)
        if not await self._attempt(groups) and len(groups) > 1:
            for submission, indices in groups.items():
                await self._attempt({submission: indices})

    async def _attempt(self, groups: dict[_Submission[Item, Result], list[int]]) -> bool:
        """Compute; hand out the results, or the error if one request alone is to blame. True on success."""
        entries = [(s, i) for s, indices in groups.items() for i in indices if not s.future.done()]
        if not entries:
            return True
        started = time.monotonic()
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(
                self._thread, self._compute, [s.items[i] for s, i in entries]
            )
            if len(results) != len(entries):
                raise RuntimeError(f"the model returned {len(results)} results for {len(entries)} items")
        except Exception as error:  # noqa: BLE001 - it belongs to the requests, not to the batcher
            logger.warning("a batch of %d items failed with %s", len(entries), type(error).__name__)
            if len(groups) == 1:
                entries[0][0].fail(error)
            return False
        seconds = (time.monotonic() - started) / len(entries)
        self._seconds_per_item = (
            0.8 * self._seconds_per_item + 0.2 * seconds if self._seconds_per_item else seconds
        )
        batch_computed(
            items=len(entries),
            cost=sum(s.costs[i] for s, i in entries),
            seconds=seconds * len(entries),
            pending=self._pending,
        )
        for (submission, index), result in zip(entries, results, strict=True):
            submission.accept(index, result)
        return True
