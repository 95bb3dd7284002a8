"""One replica of a model: its ASGI application, called by the gateway through Ray Serve instead of by an HTTP server.

A kind of model brings a function that loads it and returns a `Served`: what it is, and an ASGI application with its
endpoints, limits and errors. Everything else is the same for all kinds and stands here: which device and how many
threads, start and end of the application, and the way of a request and its answer through a Serve handle.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp, Message

from eagleray.platform.imports import packed, unpacked
from eagleray.platform.serving import ServedModel

Settings_contra = TypeVar("Settings_contra", bound=ServedModel, contravariant=True)

STREAMED = {"x-streamed": True}
"""For `openapi_extra` of a route whose answer may come in pieces."""


@dataclass(frozen=True)
class Call:
    """An HTTP request, read to its end."""

    method: str
    path: str
    query: bytes
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes


@dataclass(frozen=True)
class Reply:
    """A whole HTTP answer."""

    status: int
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes


@dataclass(frozen=True)
class Description:
    """What the gateway needs to know of a model."""

    kind: str
    name: str
    revision: str
    settings: dict[str, Any]
    """With which it was started; stays on the server's side."""
    openapi: dict[str, Any]
    """OpenAPI document of its application."""
    max_body_bytes: int
    timeout_s: float
    started: int
    """Unix time."""

    @cached_property
    def paths(self) -> dict[str, set[str]]:
        """Path -> methods."""
        return {
            path: {method.upper() for method in operations}
            for path, operations in self.openapi["paths"].items()
            if path != "/healthz"
        }

    def streams(self, path: str) -> bool:
        """Whether an answer of this path may come in pieces."""
        return any("x-streamed" in operation for operation in self.openapi["paths"][path].values())


@dataclass(frozen=True)
class Served:
    """A loaded model behind an ASGI application; the application is started and ended with `running`."""

    kind: str
    name: str
    revision: str
    settings: ServedModel
    max_body_bytes: int
    app: FastAPI
    health: Callable[[], Any]
    """Raises if requests are not answered."""
    started: int = field(default_factory=lambda: int(time.time()))
    """Unix time."""

    @property
    def description(self) -> Description:
        """For the gateway."""
        return Description(
            self.kind,
            self.name,
            self.revision,
            self.settings.model_dump(mode="json"),
            self.app.openapi(),
            self.max_body_bytes,
            self.settings.timeout_s,
            self.started,
        )

    def running(self) -> contextlib.AbstractAsyncContextManager[Any]:
        """Requests are answered inside the block."""
        return self.app.router.lifespan_context(self.app)

    async def call(self, call: Call, /) -> Reply:
        """The answer to a request, as a whole."""
        start: Message = {}
        pieces: list[bytes] = []

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                pieces.append(message.get("body", b""))

        await self.app(_scope(call), _receive(call), send)
        return Reply(start["status"], list(start["headers"]), b"".join(pieces))

    def stream(self, call: Call, /) -> AsyncGenerator[Reply | bytes]:
        """The answer piece by piece: first a `Reply` with the status and no body, then the body."""
        return answered(self.app, call)


async def answered(app: ASGIApp, call: Call) -> AsyncGenerator[Reply | bytes]:
    """What an ASGI application answers as it comes: first a `Reply` with the status and no body, then the body."""
    sent: asyncio.Queue[Message | None] = asyncio.Queue()

    async def run() -> None:
        try:
            await app(_scope(call), _receive(call), sent.put)
        finally:
            sent.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while (message := await sent.get()) is not None:
            if message["type"] == "http.response.start":
                yield Reply(message["status"], list(message["headers"]), b"")
            elif body := message.get("body", b""):
                yield body
        await task
    finally:
        task.cancel()


class Start(Protocol[Settings_contra]):
    """Loads a model; a function of a module, so that replicas import it."""

    def __call__(self, settings: Settings_contra, /, *, device: str) -> Served: ...


@serve.deployment(backpressure_config={"status_code": 429, "retry_after_s": 1})
class Replica:
    """A model in a process of its own."""

    async def __init__(self, packed_start: bytes) -> None:
        start, settings = unpacked(packed_start)
        # Here, because the gateway imports this module and needs no torch.
        from eagleray.platform.cpu import set_up_torch

        on_gpu = bool(ray.get_runtime_context().get_accelerator_ids().get("GPU"))
        if not on_gpu:
            set_up_torch(_threads())
        self._served = start(settings, device="cuda" if on_gpu else "cpu")
        self._exit = contextlib.AsyncExitStack()
        await self._exit.enter_async_context(self._served.running())

    async def describe(self) -> Description:
        """For the gateway."""
        return self._served.description

    async def call(self, call: Call) -> Reply:
        """The answer to a request; cancelling it drops the work."""
        return await self._served.call(call)

    async def stream(self, call: Call) -> AsyncIterator[Reply | bytes]:
        """The answer piece by piece."""
        async with contextlib.aclosing(self._served.stream(call)) as pieces:
            async for piece in pieces:
                yield piece

    def check_health(self) -> None:
        """Called by Serve; a replica that fails is replaced."""
        self._served.health()

    async def __del__(self) -> None:
        """Called by Serve when no request is left."""
        await self._exit.aclose()


def model_application(
    start: Start[Any], settings: ServedModel, *, kind: str, max_ongoing_requests: int
) -> Application:
    """The Serve application of one model.

    Args:
        start: Loads the model.
        settings: Its argument.
        kind: Name of the deployment.
        max_ongoing_requests: Requests that one replica works on at a time, and that may wait for one in each gateway.
    """
    resources = settings.actor_options()
    return Replica.options(
        name=kind,
        max_ongoing_requests=max_ongoing_requests,
        max_queued_requests=max_ongoing_requests,
        ray_actor_options=resources,
        graceful_shutdown_timeout_s=settings.timeout_s + 10,
        # An update starts a new replica before it ends an old one. Where replicas reserve something, the room for one
        # more may never come, and Serve would wait for it: there it ends one first, and requests wait for the next.
        max_surge_percent=0 if any(resources.values()) else 100,
    ).bind(packed((start, settings)))


def _threads() -> int:
    """What Ray reserved; if it reserved nothing, the machine is the model's."""
    reserved = ray.get_runtime_context().get_assigned_resources().get("CPU", 0)
    return max(1, int(reserved or min(os.cpu_count() or 1, ray.cluster_resources()["CPU"])))


def _scope(call: Call) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "method": call.method,
        "path": call.path,
        "raw_path": call.path.encode(),
        "root_path": "",
        "query_string": call.query,
        "headers": call.headers,
        "client": None,
        "server": None,
    }


def _receive(call: Call) -> Callable[[], Any]:
    """The body, then silence: a client that goes away shows as a cancelled call."""
    messages = iter([{"type": "http.request", "body": call.body, "more_body": False}])

    async def receive() -> Message:
        for message in messages:
            return message
        await asyncio.Event().wait()
        raise AssertionError("never set")

    return receive
