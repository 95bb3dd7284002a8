"""The models behind the gateway: those in this process, or those that run as applications of Ray Serve."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol

from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from eagleray.serve.http_app import RequestError
from eagleray.serve.replica import Call, Description, Reply, Served

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0


class Model(Protocol):
    """A model that answers requests."""

    @property
    def description(self) -> Description: ...

    async def call(self, call: Call, /) -> Reply: ...

    def stream(self, call: Call, /) -> AsyncIterator[Reply | bytes]: ...


class Fleet(Protocol):
    """The models there are at the moment."""

    @property
    def models(self) -> Mapping[str, Model]: ...

    @property
    def awaited(self) -> Sequence[str]:
        """Names of models that are to run and have not told yet what they answer."""
        ...

    def running(self) -> contextlib.AbstractAsyncContextManager[Any]: ...


class LocalFleet:
    """Models of this process, which start and end with the gateway."""

    def __init__(self, served: Sequence[Served]) -> None:
        self.models: Mapping[str, Model] = {one.name: one for one in served}
        self.awaited: Sequence[str] = ()
        self._served = served

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The models answer inside the block."""
        async with contextlib.AsyncExitStack() as stack:
            for one in self._served:
                await stack.enter_async_context(one.running())
            yield


class ServeFleet:
    """The models that run on this Ray Serve; inside the block of `running` it looks for changes once a second."""

    def __init__(self, *, gateway: str) -> None:
        """Nothing is asked yet; `gateway` is the application that is no model."""
        self.models: Mapping[str, Model] = {}
        self.awaited: Sequence[str] = ()
        self._gateway = gateway
        self._known: dict[str, tuple[float, _ServeModel]] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The models are known when the block begins, and followed until it ends."""
        await self._look()
        task = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                await self._look()
            except Exception as error:  # noqa: BLE001 - the controller may be restarting; the models stay
                logger.warning("could not ask Ray Serve for its models: %s", type(error).__name__)

    async def _look(self) -> None:
        applications = (await asyncio.to_thread(serve.status)).applications
        present = {
            name: status
            for name, status in applications.items()
            if name != self._gateway and status.status != ApplicationStatus.DELETING
        }
        for name, status in present.items():
            known = self._known.get(name)
            # One that is being replaced keeps answering as before until the new one runs.
            if status.status == ApplicationStatus.RUNNING and (
                known is None or known[0] != status.last_deployed_time_s
            ):
                with contextlib.suppress(RayError, RayServeException, AttributeError):
                    self._known[name] = (status.last_deployed_time_s, await _ServeModel.named(name))
        self._known = {name: known for name, known in self._known.items() if name in present}
        found: dict[str, Model] = {}
        for name, (_, model) in self._known.items():
            if found.setdefault(model.description.name, model) is not model:
                logger.error("application %s is not served: its model has the name of another one", name)
        self.models = found
        self.awaited = [name for name in present if name not in self._known]


class _ServeModel:
    """A model in other processes, reached by a Serve handle."""

    def __init__(self, handle: DeploymentHandle[Any], description: Description) -> None:
        self.description = description
        self._call = handle.options(method_name="call")
        self._stream = handle.options(method_name="stream", stream=True)

    @classmethod
    async def named(cls, name: str) -> _ServeModel:
        handle = await asyncio.to_thread(serve.get_app_handle, name)
        return cls(handle, await handle.options(method_name="describe").remote())

    async def call(self, call: Call) -> Reply:
        with _refusals():
            response: Any = self._call.remote(call)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise

    async def stream(self, call: Call) -> AsyncIterator[Reply | bytes]:
        with _refusals():
            pieces: Any = self._stream.remote(call)
            try:
                async for piece in pieces:
                    yield piece
            finally:
                pieces.cancel()


@contextmanager
def _refusals() -> Iterator[None]:
    """What Serve raises when no replica takes the request, as an answer after which a client may retry."""
    try:
        yield
    except BackPressureError as error:
        seconds = str(round(error.retry_after_s or 1))
        message = (
            f"All replicas of the model are busy, and as many requests wait as may. Retry after {seconds} s."
        )
        raise RequestError(429, "queue_full", message, headers={"Retry-After": seconds}) from None
    except (RayActorError, RayServeException) as error:
        logger.warning("a request could not be given to a replica: %s", type(error).__name__)
        message = "The replica stopped, or the model is starting or being unloaded. Retry after 1 s."
        raise RequestError(503, "unavailable", message, headers={"Retry-After": "1"}) from None
