"""gRPC beside HTTP: the service of `gateway.proto`, whose calls are requests to the gateway's own HTTP application.

Keys, limits, counters and answers are therefore those of HTTP. The messages are built here instead of by protoc, whose
code runs with one version of protobuf only; a test compares them with the file.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from ray.serve.grpc_util import RayServegRPCContext
from starlette.types import ASGIApp

from eagleray.serve.replica import Call, Reply, answered

SERVICE = "eagleray.v1.Gateway"

_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    405: grpc.StatusCode.UNIMPLEMENTED,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


def _file() -> FileDescriptorProto:
    kinds = {"string": FieldDescriptorProto.TYPE_STRING, "bytes": FieldDescriptorProto.TYPE_BYTES}
    messages = {
        "Request": {"path": "string", "body": "bytes", "content_type": "string", "method": "string"},
        "Response": {"body": "bytes", "content_type": "string"},
    }
    file = FileDescriptorProto(name="eagleray/serve/gateway.proto", package="eagleray.v1", syntax="proto3")
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields.items(), 1):
            label = FieldDescriptorProto.LABEL_OPTIONAL
            message.field.add(name=field, number=number, type=kinds[kind], label=label)
    service = file.service.add(name="Gateway")
    types = {"input_type": ".eagleray.v1.Request", "output_type": ".eagleray.v1.Response"}
    service.method.add(name="Call", **types)
    service.method.add(name="Stream", server_streaming=True, **types)
    return file


FILE = _file()
_pool = descriptor_pool.Default()
_pool.AddSerializedFile(FILE.SerializeToString())
Request: Any = message_factory.GetMessageClass(_pool.FindMessageTypeByName("eagleray.v1.Request"))
Response: Any = message_factory.GetMessageClass(_pool.FindMessageTypeByName("eagleray.v1.Response"))


def add_gateway_to_server(servicer: Any, server: grpc.Server) -> None:
    """For Serve's `grpc_servicer_functions`. Requests stay bytes on their way to the gateway: Serve would pickle them."""
    handlers = {
        "Call": grpc.unary_unary_rpc_method_handler(servicer.Call),
        "Stream": grpc.unary_stream_rpc_method_handler(servicer.Stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


class Refused(Exception):
    """The answer is an HTTP error, which the context holds as a status."""


async def call(app: ASGIApp, request: bytes, context: RayServegRPCContext) -> Any:
    """The whole answer; empty if the status of the context is an error."""
    pieces, content_type = [], ""
    with contextlib.suppress(Refused):
        async for answer in stream(app, request, context):
            pieces.append(answer.body)
            content_type = answer.content_type
    return Response(body=b"".join(pieces), content_type=content_type)


async def stream(app: ASGIApp, request: bytes, context: RayServegRPCContext) -> AsyncGenerator[Any]:
    """The answer as it comes.

    Raises:
        Refused: Serve sends the status of a stream that has no pieces only with an exception.
    """
    asked = _call(Request.FromString(request), context)
    status, content_type, error = 500, "", b""
    async with contextlib.aclosing(answered(app, asked)) as pieces:
        async for piece in pieces:
            if isinstance(piece, Reply):
                status = piece.status
                content_type = dict(piece.headers).get(b"content-type", b"").decode("latin-1")
            elif status >= 400:
                error += piece
            else:
                yield Response(body=piece, content_type=content_type)
    if status >= 400:
        context.set_code(_STATUS.get(status, grpc.StatusCode.INTERNAL))
        context.set_details(error.decode("utf-8", "replace"))
        raise Refused(f"HTTP {status}")


def _call(request: Any, context: RayServegRPCContext) -> Call:
    path, _, query = request.path.partition("?")
    headers = [(b"content-type", (request.content_type or "application/json").encode("latin-1", "replace"))]
    for name, value in context.invocation_metadata():
        if name in ("authorization", "x-api-key"):
            headers.append((name.encode(), value.encode("latin-1", "replace")))
    return Call(request.method or "POST", path, query.encode("latin-1", "replace"), headers, request.body)
