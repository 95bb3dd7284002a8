"""A thread that decodes for all requests at once, and the way to it from the event loop.

Between two steps of the batch the thread lets in who waits (in the order of arrival, as long as rows and cache allow),
takes out whom nobody waits for any more, and tells the requests of their new tokens. A request looks at its own
`Continuation`; only the thread writes to it.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol, Self

from eagleray.models.backbone.decoding import Continuation, FinishReason
from eagleray.serve.batching import BatcherClosed, QueueFull


class Decoder(Protocol):
    """What is driven: a `ContinuousDecoder`, or anything that does the same."""

    @property
    def active(self) -> list[Continuation]: ...
    @property
    def columns(self) -> int: ...
    def add(self, new: list[Continuation], /) -> None: ...
    def step(self) -> None: ...
    def drop(self, given_up: list[Continuation], /) -> None: ...


class Progress:
    """A continuation in the hands of the thread."""

    def __init__(self, continuation: Continuation, loop: asyncio.AbstractEventLoop) -> None:
        self.continuation = continuation
        self.error: Exception | None = None
        self.given_up = False
        self._loop, self._changed = loop, asyncio.Event()

    def notify(self) -> None:
        """From the thread: something changed."""
        self._loop.call_soon_threadsafe(self._changed.set)

    async def changes(self) -> AsyncIterator[FinishReason | None]:
        """One turn for each look at `continuation` that may show something new.

        Yields:
            `None` while more may come; in the last turn how the continuation ended. The thread goes on writing during a
            turn, so this and not `continuation.finished` tells the turns apart.

        Raises:
            Exception: What the model raised on it.
        """
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self.error is not None:
                raise self.error
            ended = self.continuation.finished
            yield ended
            if ended:
                return


class DecodingLoop:
    """Runs a decoder in one thread; an async context manager."""

    def __init__(
        self, new_decoder: Callable[[], Decoder], *, max_rows: int, max_batch_tokens: int, max_pending: int
    ) -> None:
        """Prepare; nothing runs before the context is entered.

        Args:
            new_decoder: Makes an empty decoder; called again after a failure, which leaves none to trust.
            max_rows: Continuations that are decoded at a time.
            max_batch_tokens: Bound on rows times the longest row to come, prompt and new tokens; that is what the
                cache may grow to.
            max_pending: Continuations waiting or being decoded; what comes on top is refused.
        """
        self._new_decoder = new_decoder
        self._max_rows, self._max_batch_tokens, self._max_pending = max_rows, max_batch_tokens, max_pending
        self._decoder: Decoder | None = None
        self._waiting: deque[Progress] = deque()
        self._running: dict[Continuation, Progress] = {}
        self._changed = threading.Condition()
        self._closed = True
        self._thread: threading.Thread | None = None

    async def __aenter__(self) -> Self:
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        assert self._thread is not None
        await asyncio.to_thread(self._thread.join)

    @property
    def alive(self) -> bool:
        """Whether continuations are taken."""
        return not self._closed and self._thread is not None and self._thread.is_alive()

    @property
    def pending(self) -> int:
        """Continuations waiting or being decoded."""
        return len(self._waiting) + len(self._running)

    @asynccontextmanager
    async def decoding(self, continuations: list[Continuation]) -> AsyncIterator[list[Progress]]:
        """Hand continuations in for the length of the block; leaving it gives up those that are not finished.

        Raises:
            QueueFull: They do not fit beside those pending.
            BatcherClosed: The loop is not running.
        """
        if not self.alive:
            raise BatcherClosed("the decoding loop is not running")
        loop = asyncio.get_running_loop()
        handed_in = [Progress(continuation, loop) for continuation in continuations]
        with self._changed:
            if self.pending + len(handed_in) > self._max_pending:
                raise QueueFull(
                    needed=len(handed_in), pending=self.pending, limit=self._max_pending, retry_after_s=1
                )
            self._waiting.extend(handed_in)
            self._changed.notify()
        try:
            yield handed_in
        finally:
            with self._changed:
                for progress in handed_in:
                    progress.given_up = True
                self._waiting = deque(progress for progress in self._waiting if not progress.given_up)

    def _run(self) -> None:
        self._decoder = self._new_decoder()
        while True:
            with self._changed:
                while not (self._closed or self._waiting or self._running):
                    self._changed.wait()
                if self._closed:
                    self._fail([*self._waiting, *self._running.values()], BatcherClosed("the loop stopped"))
                    return
                new = self._let_in()
            try:
                self._turn(new)
            except Exception as error:  # noqa: BLE001 - whatever it is, the requests get to know
                self._running |= {progress.continuation: progress for progress in new}
                self._fail(list(self._running.values()), error)
                self._running.clear()
                self._decoder = self._new_decoder()

    def _let_in(self) -> list[Progress]:
        new: list[Progress] = []
        while self._waiting and self._fits(
            [*self._running, *(one.continuation for one in new)], self._waiting[0]
        ):
            new.append(self._waiting.popleft())
        return new

    def _fits(self, rows: list[Continuation], candidate: Progress) -> bool:
        assert self._decoder is not None
        everyone = [*rows, candidate.continuation]
        width = max(self._decoder.columns, *(len(one.prompt) for one in everyone))
        width += max(one.max_tokens - len(one.tokens) for one in everyone)
        within = len(everyone) <= self._max_rows and len(everyone) * width <= self._max_batch_tokens
        return within or not rows  # one alone always runs; its length was checked before it was handed in

    def _turn(self, new: list[Progress]) -> None:
        """One step of the batch, and the first tokens of `new`."""
        assert self._decoder is not None
        given_up = [one for one, progress in self._running.items() if progress.given_up]
        self._decoder.drop(given_up)
        for one in given_up:
            del self._running[one]
        if self._running:
            self._decoder.step()
        self._running |= {progress.continuation: progress for progress in new}
        self._decoder.add([progress.continuation for progress in new])
        for one, progress in list(self._running.items()):
            if one.finished is not None:  # first: who is told may ask again at once
                del self._running[one]
            progress.notify()

    def _fail(self, whom: list[Progress], error: Exception) -> None:
        for progress in whom:
            progress.error = error
            progress.notify()
