"""A client of the gateway's gRPC service as others make theirs: from the .proto file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc

import eagleray.serve

PROTO = Path(eagleray.serve.__path__[0]) / "gateway.proto"


def compiled(folder: Path) -> FileDescriptorSet:
    """What protoc makes of the file; writes into a folder."""
    arguments = ["", f"-I{PROTO.parent}", f"--descriptor_set_out={folder / 'gateway.binpb'}", PROTO.name]
    assert protoc.main(arguments) == 0
    return FileDescriptorSet.FromString((folder / "gateway.binpb").read_bytes())


class Client:
    """Calls over a channel."""

    def __init__(self, address: str, folder: Path) -> None:
        pool = descriptor_pool.DescriptorPool()
        for file in compiled(folder).file:
            pool.AddSerializedFile(file.SerializeToString())
        types = [
            message_factory.GetMessageClass(pool.FindMessageTypeByName(f"eagleray.v1.{name}"))
            for name in ("Request", "Response")
        ]
        self.Request: Any = types[0]
        coding: Any = {
            "request_serializer": types[0].SerializeToString,
            "response_deserializer": types[1].FromString,
        }
        channel = grpc.insecure_channel(address)
        self._call = channel.unary_unary("/eagleray.v1.Gateway/Call", **coding)
        self._stream = channel.unary_stream("/eagleray.v1.Gateway/Stream", **coding)
        self._sent: Any = {"metadata": [("application", "gateway")], "timeout": 60}

    def call(self, **request: Any) -> Any:
        """The whole answer."""
        return self._call(self.Request(**request), **self._sent)

    def stream(self, **request: Any) -> list[Any]:
        """All pieces of an answer."""
        return list(self._stream(self.Request(**request), **self._sent))
