"""Around the whole gateway: API keys and their rates, a log line and the counters of each request.

The line holds method, path, model, status, milliseconds, bytes and the name of the key, never a text of a user. Ray Serve
gives every request an id (its `X-Request-ID`, or a new one), sends it back, and adds it to the line.
"""

from __future__ import annotations

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eagleray.platform.keys import Key, KeyChecker
from eagleray.serve.http_app import error_response
from eagleray.serve.metrics import request_answered
from eagleray.serve.page import FILES

# Below the logger that Serve sets up, so that lines are written as `LoggingConfig` says.
logger = logging.getLogger("ray.serve.eagleray")

OPEN_PATHS = frozenset({"/", "/healthz"})
"""Answered without a key, as are the files of the page."""

_OWN_PATHS = frozenset({"/", "/healthz", "/v1/models", "/docs", "/openapi.json"})


class Guard:
    """ASGI middleware; the application notes under `scope["state"]` which model answered, and the path it offers."""

    def __init__(self, app: ASGIApp, *, keys: KeyChecker | None) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, size = time.monotonic(), 499, 0  # nothing sent: the client went away
        state = scope.setdefault("state", {})

        async def noted_send(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
            size += len(message.get("body", b""))
            await send(message)

        try:
            refusal = self._refusal(scope)
            await (refusal or self._app)(scope, receive, noted_send)
        finally:
            seconds = time.monotonic() - started
            # Only paths that exist, or anybody could make up as many counters as they like.
            own = scope["path"] if scope["path"] in _OWN_PATHS else "other"
            model, path = state.get("model", ""), state.get("path", own)
            request_answered(model=model, path=path, status=status, seconds=seconds)
            facts = {
                "method": scope["method"],
                "served_path": path,
                "model": model,
                "status": status,
                "ms": round(1000 * seconds, 1),
                "bytes": size,
                "key": state.get("key", ""),
            }
            logger.info(
                "%s %s %s %s %.1f ms", scope["method"], path, model, status, 1000 * seconds, extra=facts
            )

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        """401 or 429 as an application, or None if the request may pass."""
        if self._keys is None or scope["path"] in OPEN_PATHS or scope["path"].startswith(FILES):
            return None
        key = self._owner(scope, self._keys)
        if key is None:
            message = "This server needs an API key: send `Authorization: Bearer KEY`."
            return error_response(401, "unauthorized", message, headers={"WWW-Authenticate": "Bearer"})
        scope["state"]["key"] = key.name
        if wait := self._keys.wait_s(key):
            message = f"This key allows {key.per_minute} requests a minute. Retry after {wait} s."
            return error_response(429, "rate_limited", message, headers={"Retry-After": str(wait)})
        return None

    def _owner(self, scope: Scope, keys: KeyChecker) -> Key | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        scheme, _, secret = headers.get(b"authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            secret = headers.get(b"x-api-key", "")
        return keys.owner(secret.strip()) if secret else None
