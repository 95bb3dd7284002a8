"""The body of an HTML form with files (`multipart/form-data`, RFC 7578), already in memory and limited in size.

A few lines here take the place of a package that FastAPI would need for it; nothing is written to disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from email.message import Message

_MAX_PARTS = 1000


class MultipartError(ValueError):
    """The body is not what its header says."""


@dataclass(frozen=True)
class Part:
    """One field of a form."""

    name: str
    content: bytes


def parse_multipart(content_type: str, body: bytes) -> list[Part]:
    """The fields of a form, in order; contents as they were sent, byte for byte.

    Args:
        content_type: Value of the `Content-Type` header, with the boundary.
        body: The whole body.

    Raises:
        MultipartError: There is no boundary, the body does not end with it, or a part has no name.
    """
    boundary = _header(content_type).get_param("boundary", failobj=None, header="content-type")
    if not isinstance(boundary, str) or not boundary:
        raise MultipartError("the Content-Type names no boundary")
    # With a line break in front, the first delimiter looks like all others.
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary.encode("latin-1", "replace"))
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise MultipartError("the body does not end with its boundary")
    if len(pieces) > _MAX_PARTS:
        raise MultipartError(f"the body has more than {_MAX_PARTS} fields")
    return [_part(piece) for piece in pieces[1:-1]]


def _part(piece: bytes) -> Part:
    head, separator, content = piece.lstrip(b" \t").removeprefix(b"\r\n").partition(b"\r\n\r\n")
    if not separator:
        raise MultipartError("a field has no header")
    for line in head.decode("utf-8", "replace").split("\r\n"):
        key, _, value = line.partition(":")
        if key.strip().lower() == "content-disposition":
            name = _header(value.strip()).get_param("name", failobj=None, header="content-type")
            if isinstance(name, str):
                return Part(name, content)
    raise MultipartError("a field has no name")


def _header(value: str) -> Message:
    message = Message()
    message["content-type"] = value.replace("\r", " ").replace("\n", " ")
    return message
