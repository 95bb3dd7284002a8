"""What every HTTP application here shares: uniform errors for people, limits on body and time, nothing of users in logs.

Every answer that is not a success has the body `{"error": {"code", "message", "problems": [{"field", "problem"}]}}`.
Messages say what was given by kind and size, and what is allowed; they never repeat a user's text, and neither does
the log: a failure is logged with the type of the exception and where it was raised, without its message.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import eagleray
from eagleray.serve.batching import BatcherClosed, QueueFull
from eagleray.serve.protocol import Error, ErrorResponse, Problem

logger = logging.getLogger(__name__)

_SHOWN_PROBLEMS = 3
_LONGEST_NAME = 40
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "The body cannot be decoded.",
        401: "The server needs an API key, and the request has none or another.",
        404: "There is no such model here.",
        413: "The body is larger than the server takes.",
        422: "The request is not valid; `problems` names each field.",
        429: "The queue is full; retry after the seconds in `Retry-After`.",
        500: "The model failed on this request.",
        503: "The model is starting or shutting down; retry.",
        504: "The request was not answered within the time limit.",
    }.items()
}
"""For the `responses` of a route."""

_CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed"}


class RequestError(HTTPException):
    """A refusal with a uniform body; raised anywhere below the application."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        problems: Sequence[Problem] = (),
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, detail=message, headers=headers)
        self.code, self.problems = code, list(problems)


def invalid(field: str, problem: str) -> RequestError:
    """422 for one field, for checks that need the server's settings."""
    problems = [Problem(field=field, problem=problem)]
    return RequestError(422, "invalid_request", _summary(problems), problems=problems)


def unknown_model(names: str) -> RequestError:
    """404 for a name that none of `names` is."""
    return RequestError(
        404, "model_not_found", f"There is no such model here; /v1/models lists for this endpoint: {names}."
    )


def check_model(asked: str | None, name: str) -> None:
    """Refuse a request that is for another model than the one at hand."""
    if asked is not None and asked != name:
        raise unknown_model(name)


def new_app(
    *,
    title: str,
    description: str,
    max_body_bytes: int,
    timeout_s: float,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]],
) -> FastAPI:
    """A FastAPI application with the uniform errors and limits; the caller adds its routes."""
    app = FastAPI(title=title, description=description, version=eagleray.__version__, lifespan=lifespan)
    app.add_middleware(_Limits, max_body_bytes=max_body_bytes, timeout_s=timeout_s)
    add_error_handlers(app)
    return app


def add_error_handlers(app: FastAPI) -> None:
    """Give an application the uniform errors."""
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(StarletteHTTPException, _on_http_error)
    app.add_exception_handler(QueueFull, _on_queue_full)
    app.add_exception_handler(BatcherClosed, _on_closed)


def error_response(
    status: int,
    code: str,
    message: str,
    *,
    problems: Sequence[Problem] = (),
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """The uniform body."""
    body = ErrorResponse(error=Error(code=code, message=message, problems=list(problems)))
    return JSONResponse(body.model_dump(), status_code=status, headers=headers)


class _Limits:
    """ASGI middleware: refuses large bodies, stops slow requests, answers when a handler fails."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, timeout_s: float):
        self._app, self._max_body_bytes, self._timeout_s = app, max_body_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def noted_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        limit = asyncio.timeout(self._timeout_s)
        try:
            async with limit:
                await self._app(scope, limited_receive(scope, receive, self._max_body_bytes), noted_send)
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets an answer
            if limit.expired():
                response = timed_out(self._timeout_s)
            else:
                logger.error("%s %s failed: %s", scope["method"], scope["path"], _where(error))
                response = error_response(
                    500, "internal", "The model failed on this request; the log says where."
                )
            if not started:
                await response(scope, receive, send)


def timed_out(seconds: float) -> JSONResponse:
    """504."""
    return error_response(
        504, "timeout", f"The request was not answered within {seconds:g} s. Retry later, or send less."
    )


def limited_receive(scope: Scope, receive: Receive, max_body_bytes: int) -> Receive:
    """`receive` that fails above the limit: at once if the size is declared, else while the body arrives.

    It raises an HTTP exception because FastAPI turns any other error while reading a body into a 400. FastAPI's
    own `max_body_size` answers with plain text instead of the uniform body.
    """
    header = dict(scope["headers"]).get(b"content-length", b"")
    declared = int(header) if header.isdigit() else 0
    received = 0
    too_large = RequestError(
        413,
        "body_too_large",
        f"The body is larger than {max_body_bytes} bytes, the most this server takes. Send shorter or fewer texts.",
    )

    async def limited() -> Message:
        nonlocal received
        if declared > max_body_bytes:
            raise too_large
        message = await receive()
        received += len(message.get("body", b""))
        if received > max_body_bytes:
            raise too_large
        return message

    return limited


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = [_explain(dict(e)) for e in error.errors()]
    return error_response(422, "invalid_request", _summary(problems), problems=problems)


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    headers = dict(error.headers) if error.headers else None
    if isinstance(error, RequestError):
        return error_response(
            error.status_code, error.code, error.detail, problems=error.problems, headers=headers
        )
    message = f"{request.method} {request.url.path}: {error.detail}. The endpoints are listed at /docs."
    return error_response(error.status_code, _CODES.get(error.status_code, "error"), message, headers=headers)


async def _on_queue_full(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, QueueFull)
    message = (
        f"The queue is full: this request needs {error.needed} item(s), {error.pending} of {error.limit} are "
        f"pending. Retry after {error.retry_after_s} s."
    )
    return error_response(429, "queue_full", message, headers={"Retry-After": str(error.retry_after_s)})


async def _on_closed(request: Request, error: Exception) -> JSONResponse:
    message = "This replica is starting or shutting down. Retry after 1 s."
    return error_response(503, "unavailable", message, headers={"Retry-After": "1"})


def _summary(problems: Sequence[Problem]) -> str:
    shown = "; ".join(f"`{p.field}` {p.problem}" for p in problems[:_SHOWN_PROBLEMS])
    rest = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
    return f"The request is not valid: {shown}{rest}."


def _explain(error: dict[str, Any]) -> Problem:
    """One validation error in words. Pydantic's own text is kept where it says what is allowed."""
    # Parts in parentheses are the tags of a union, which a client never sees.
    path = [_shown(str(part)) for part in error["loc"][1:] if not str(part).startswith("(")]
    given, context = error["input"], error.get("ctx", {})
    match error["type"]:
        case "missing":
            problem = "is required"
        case "json_invalid":
            path, problem = [], "is not valid JSON"
        case "extra_forbidden":
            problem = "is not a known field; remove it (the fields are listed at /docs)"
        case "literal_error":
            shown = f"'{_shown(given)}'" if isinstance(given, str) else _kind(given)
            problem = f"is {shown}; it must be {context['expected']}"
        case "too_short":
            problem = f"has {context['actual_length']} item(s); at least {context['min_length']} are needed"
        case "string_type":
            problem = f"is {_kind(given)}; it must be a text"
        case "string_unicode":
            problem = "holds characters that are not valid Unicode"
        case "list_type":
            problem = f"is {_kind(given)}; it must be a list"
        case "model_attributes_type" | "model_type" | "dict_type":
            where = "" if path else ", sent with `Content-Type: application/json`"
            problem = f"is {_kind(given)}; it must be a JSON object{where}"
        case "value_error":
            problem = str(context["error"])
        case _:
            problem = str(error["msg"])
    return Problem(field=".".join(path) or "body", problem=problem)


def _shown(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "..."


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str() | bytes():
            return "a text"
        case list():
            return f"a list of {len(value)}"
        case _:
            return "an object"


def _where(error: BaseException) -> str:
    """Type and stack of an exception without its message, which may hold a user's text."""
    frames = traceback.extract_tb(error.__traceback__)
    stack = " < ".join(f"{frame.name} ({frame.filename}:{frame.lineno})" for frame in reversed(frames[-8:]))
    return f"{type(error).__name__} in {stack}"
