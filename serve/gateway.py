"""The one door to all models: an HTTP application that hands each request to the model it is for.

A model is an ASGI application of its own (`replica.py`) and knows its endpoints, limits and errors; the gateway knows
which models run and what they offer, and nothing about their kinds. A request goes to the model that serves its path;
if several do, its `model` decides: a parameter of the address, a field of the JSON body, or a part of the form.

The models are those that run on this Ray Serve, whoever deployed them: `eagleray serve`, `serve deploy` or KubeRay.
The gateway looks once a second, so that models come and go without a restart.
"""

# No postponed annotations here: Ray Serve looks at the annotation of `build_app` itself to learn the type of its
# arguments, and passes the YAML on unchecked when it finds a string.

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import field_validator
from ray import serve
from ray.serve import Application
from ray.serve.grpc_util import RayServegRPCContext
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketClose

import eagleray
from eagleray.platform.config import Config
from eagleray.platform.keys import KeyChecker
from eagleray.serve import rpc
from eagleray.serve.fleet import Fleet, Model, ServeFleet
from eagleray.serve.guard import Guard
from eagleray.serve.http_app import (
    ERROR_RESPONSES,
    RequestError,
    add_error_handlers,
    invalid,
    limited_receive,
    timed_out,
    unknown_model,
)
from eagleray.serve.multipart import MultipartError, parse_multipart
from eagleray.serve.openai import ModelCard, ModelList
from eagleray.serve.page import add_page
from eagleray.serve.protocol import GatewayHealthResponse
from eagleray.serve.replica import Call, Description, Reply

NAME = "gateway"
"""Of the application and its deployment."""
MAX_ONGOING_REQUESTS = 1024
"""Requests that one gateway has open at a time; each model has a lower bound of its own."""

_FORWARDED = frozenset({b"accept", b"content-length", b"content-type"})
_HEALTH_S = 5.0
_GRACE_S = 1.0  # a model's own limit answers first; this one is for requests that no replica takes


class Args(Config):
    """Argument of `build_app`."""

    keys: str | None = None
    """File of API keys (`eagleray keys add`), readable on every node that runs a gateway. Without one, no key is asked
    for."""

    @field_validator("keys")
    @classmethod
    def _keys_are_absolute(cls, path: str | None) -> str | None:
        # Replicas run in folders of their own.
        return None if path is None else str(Path(path).expanduser().absolute())


def gateway_app(fleet: Fleet, *, keys: KeyChecker | None = None) -> FastAPI:
    """The HTTP application in front of a fleet; with `keys`, requests need one."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with fleet.running():
            yield

    app = FastAPI(title="Eagleray", version=eagleray.__version__, lifespan=lifespan)
    app.add_middleware(Guard, keys=keys)
    add_error_handlers(app)

    @app.get("/healthz", responses={503: ERROR_RESPONSES[503]}, summary="Whether every model takes requests")
    async def healthz() -> GatewayHealthResponse:
        return await _health(fleet.models.values())

    @app.get(
        "/v1/models",
        responses={401: ERROR_RESPONSES[401]},
        summary="The models that are served, and their endpoints",
    )
    async def models() -> ModelList:
        return ModelList(data=[_card(model.description) for model in fleet.models.values()])

    add_page(app)
    app.openapi = lambda: _openapi(app, [model.description for model in fleet.models.values()])
    app.mount("/", _Forward(fleet))
    return app


class _Forward:
    """ASGI application that hands requests to models."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await WebSocketClose()(scope, receive, send)
            return
        candidates = self._candidates(scope["method"], scope["path"])
        longest = max(model.description.timeout_s for model in candidates)
        largest = max(model.description.max_body_bytes for model in candidates)
        limit = asyncio.timeout(longest + _GRACE_S)
        started = False
        try:
            async with limit:
                body = await _read(limited_receive(scope, receive, largest))
                model = _chosen(candidates, self._fleet.awaited, scope, body)
                scope["state"] |= {"model": model.description.name, "path": scope["path"]}
                limit.reschedule(asyncio.get_running_loop().time() + model.description.timeout_s + _GRACE_S)
                headers = [(name, value) for name, value in scope["headers"] if name in _FORWARDED]
                call = Call(scope["method"], scope["path"], scope["query_string"], headers, body)
                async with contextlib.aclosing(_answer(model, call)) as pieces:
                    async for piece in pieces:
                        started = True
                        await _send(piece, send)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            if started or not limit.expired():
                raise
            await timed_out(longest)(scope, receive, send)

    def _candidates(self, method: str, path: str) -> list[Model]:
        """The models that serve a path.

        Raises:
            RequestError: 404 or 405; 503 while a model that may serve it is not running.
        """
        offered = [model for model in self._fleet.models.values() if path in model.description.paths]
        candidates = [model for model in offered if method in model.description.paths[path]]
        if not offered and self._fleet.awaited:
            raise _not_running(self._fleet.awaited)
        if not candidates:
            status, code = (405, "method_not_allowed") if offered else (404, "not_found")
            message = f"{method} {path}: no model here answers that. The endpoints are listed at /docs."
            raise RequestError(status, code, message)
        return candidates


async def _answer(model: Model, call: Call) -> AsyncGenerator[Reply | bytes]:
    """Status and headers, then the body."""
    if model.description.streams(call.path):
        async for piece in model.stream(call):
            yield piece
    else:
        reply = await model.call(call)
        yield reply
        yield reply.body


async def _send(piece: Reply | bytes, send: Send) -> None:
    if isinstance(piece, Reply):
        await send({"type": "http.response.start", "status": piece.status, "headers": list(piece.headers)})
    else:
        await send({"type": "http.response.body", "body": piece, "more_body": True})


async def _read(receive: Receive) -> bytes:
    pieces: list[bytes] = []
    while (message := await receive())["type"] == "http.request":
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces)
    raise RequestError(400, "bad_request", "The connection was closed before the body had arrived.")


def _chosen(candidates: Sequence[Model], awaited: Sequence[str], scope: Scope, body: bytes) -> Model:
    """The one that the request is for.

    Raises:
        RequestError: It names none of them, or one that is not running, or none although there are several.
    """
    name = model_name(scope, body, look_inside=len(candidates) > 1 or bool(awaited))
    names = ", ".join(model.description.name for model in candidates)
    if name is None:
        if len(candidates) == 1:
            return candidates[0]
        raise invalid("model", f"is missing, and several models serve {scope['path']}: {names}")
    for model in candidates:
        if model.description.name == name:
            return model
    raise _not_running([name]) if name in awaited else unknown_model(names)


def _not_running(names: Sequence[str]) -> RequestError:
    message = f"Not running at the moment: {', '.join(names)}. Retry after 1 s."
    return RequestError(503, "unavailable", message, headers={"Retry-After": "1"})


def model_name(scope: Scope, body: bytes, *, look_inside: bool) -> str | None:
    """Name of the model in the address, or in a JSON body or a form; None where there is none."""
    if named := parse_qs(scope["query_string"].decode("latin-1")).get("model"):
        return named[0]
    if not look_inside:
        return None
    content_type = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1")
    if content_type.startswith("multipart/form-data"):
        with contextlib.suppress(MultipartError):
            for part in parse_multipart(content_type, body):
                if part.name == "model":
                    return part.content.decode("utf-8", "replace")
        return None
    # Whatever else is wrong with the body, the model's own application says it better.
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(body)
        if isinstance(value, dict) and isinstance(value.get("model"), str):
            return value["model"]
    return None


async def _health(models: Iterable[Model]) -> GatewayHealthResponse:
    models = list(models)
    call = Call("GET", "/healthz", b"", [], b"")
    replies = await asyncio.gather(*(_patient(model.call(call)) for model in models), return_exceptions=True)
    healthy: list[Any] = []
    for model, reply in zip(models, replies, strict=True):
        if not isinstance(reply, Reply) or reply.status != 200:
            message = f"The model {model.description.name} does not answer. Retry after 1 s."
            raise RequestError(503, "unavailable", message, headers={"Retry-After": "1"})
        healthy.append(json.loads(reply.body) | {"kind": model.description.kind})
    if not healthy:
        message = "No model is served yet. Retry after 1 s."
        raise RequestError(503, "unavailable", message, headers={"Retry-After": "1"})
    return GatewayHealthResponse(models=healthy)


async def _patient(reply: Coroutine[Any, Any, Reply]) -> Reply:
    async with asyncio.timeout(_HEALTH_S):
        return await reply


def _card(about: Description) -> ModelCard:
    return ModelCard(
        id=about.name,
        created=about.started,
        kind=about.kind,
        revision=about.revision,
        endpoints=sorted(about.paths),
    )


def _openapi(app: FastAPI, models: Sequence[Description]) -> dict[str, Any]:
    """The gateway's own endpoints and those of all models; what several kinds offer is described once."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        routes=app.routes,
        description="Models: " + (", ".join(f"{about.name} ({about.kind})" for about in models) or "none"),
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for about in models:
        for path in about.paths:
            document["paths"].setdefault(path, about.openapi["paths"][path])
        for name, schema in about.openapi["components"]["schemas"].items():
            schemas.setdefault(name, schema)
    return document


@serve.deployment(
    name=NAME,
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    max_queued_requests=MAX_ONGOING_REQUESTS,
    backpressure_config={"status_code": 429, "retry_after_s": 1},
    ray_actor_options={"num_cpus": 0},
)
@serve.ingress()
class Gateway:
    """One replica of the gateway."""

    def __init__(self, args: Args):
        keys = None if args.keys is None else KeyChecker(Path(args.keys))
        self._app = gateway_app(ServeFleet(gateway=NAME), keys=keys)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def Call(self, request: bytes, grpc_context: RayServegRPCContext) -> Any:
        """gRPC: the whole answer."""
        return await rpc.call(self._app, request, grpc_context)

    async def Stream(self, request: bytes, grpc_context: RayServegRPCContext) -> AsyncGenerator[Any]:
        """gRPC: the answer piece by piece."""
        async for piece in rpc.stream(self._app, request, grpc_context):
            yield piece


def build_app(args: Args) -> Application:
    """The Serve application; `eagleray.serve.gateway:build_app` is the import path for `serve deploy`."""
    return Gateway.bind(args)
