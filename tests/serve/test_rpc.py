"""gRPC in front of the gateway's HTTP application, without Ray: the wire format, answers, errors and keys."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from rpc_client import PROTO, compiled
from serving_cases import judge, language_model

from eagleray.platform.keys import KeyChecker, add_key
from eagleray.serve import rpc
from eagleray.serve.fleet import LocalFleet
from eagleray.serve.gateway import gateway_app

PAIR = {"prompt": "Name a river.", "a": "Ucayali", "b": "Nile"}


class Context:
    """What Serve hands to a method."""

    def __init__(self, **metadata: str) -> None:
        self.metadata, self.code, self.details = metadata, grpc.StatusCode.OK, ""

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        return [("application", "gateway"), *self.metadata.items()]

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details


def ask(send: Callable[..., Any], context: Context, *, keys: KeyChecker | None = None, **request: Any) -> Any:
    """One call of a gateway with a judge, and a language model where that is asked."""
    served = [judge("judge"), *([language_model("talker")] if "completions" in request["path"] else [])]

    async def run() -> Any:
        app = gateway_app(LocalFleet(served), keys=keys)
        async with app.router.lifespan_context(app):
            return await send(app, rpc.Request(**request).SerializeToString(), context)

    return asyncio.run(run())


async def pieces(app: Any, request: bytes, context: Context) -> list[bytes]:
    return [piece.body async for piece in rpc.stream(app, request, context)]  # type: ignore[arg-type]


def test_the_messages_are_those_of_the_file(tmp_path: Path) -> None:
    [file] = compiled(tmp_path).file
    for message in file.message_type:
        for field in message.field:
            field.ClearField("json_name")  # protoc fills it in
    assert file.name == PROTO.name and rpc.FILE.name.endswith(f"/{PROTO.name}")
    file.name = rpc.FILE.name
    assert file == rpc.FILE


def test_an_answer_is_that_of_http() -> None:
    context = Context()
    answer = ask(rpc.call, context, path="/compare", body=json.dumps(PAIR).encode())
    assert context.code == grpc.StatusCode.OK and answer.content_type == "application/json"
    assert 0 < json.loads(answer.body)["p_a"] < 1
    listed = ask(rpc.call, Context(), path="/v1/models", method="GET")
    assert [card["id"] for card in json.loads(listed.body)["data"]] == ["judge"]


def test_a_stream_comes_in_pieces() -> None:
    body = {"model": "talker", "prompt": "numbers", "max_tokens": 24, "stream": True}
    found = ask(pieces, Context(), path="/v1/completions", body=json.dumps(body).encode())
    assert len(found) > 2 and found[-1] == b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    "request_, code",
    [
        ({"path": "/compare", "body": b"{"}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"path": "/compare", "body": b"{}"}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"path": "/compare", "method": "GET"}, grpc.StatusCode.UNIMPLEMENTED),
        ({"path": "/nothing", "body": b"{}"}, grpc.StatusCode.NOT_FOUND),
        (
            {"path": "/compare?model=nobody", "body": json.dumps(PAIR).encode()},
            grpc.StatusCode.NOT_FOUND,
        ),
    ],
)
def test_errors_are_statuses_with_the_body_of_http(request_: dict[str, Any], code: grpc.StatusCode) -> None:
    for send in (rpc.call, pieces):
        context = Context()
        try:
            answer = ask(send, context, **request_)
        except rpc.Refused:
            assert send is pieces
        else:
            assert send is rpc.call and answer.body == b""
        assert context.code == code and json.loads(context.details)["error"]["message"]


def test_keys_come_as_metadata(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.json", "me", per_minute=1)
    keys = KeyChecker(tmp_path / "keys.json")
    codes = []
    for metadata in ({}, {"authorization": f"Bearer {key}"}, {"x-api-key": key}):
        context = Context(**metadata)
        ask(rpc.call, context, keys=keys, path="/compare", body=json.dumps(PAIR).encode())
        codes.append(context.code)
    refused, limited = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED
    assert codes == [refused, grpc.StatusCode.OK, limited]
