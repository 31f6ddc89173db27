"""Bodies: a request's, read within bounds, and a JSON response's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive

from chiasm.errors import Code, PayloadTooLargeError
from chiasm.http.untrusted import whole_number


class ClientLeftError(Exception):
    """The client closed its connection, so nobody would read an answer."""


async def read_body(
    receive: Receive, headers: Headers, max_bytes: int, hold: Callable[[int], None] = lambda size_bytes: None
) -> bytes:
    """Return the whole body of at most ``max_bytes``.

    ``hold`` is told the size of every chunk before it is kept, and may raise to refuse it. Raises PayloadTooLargeError, for a
    declared length before anything is read, InvalidRequestError and ClientLeftError.
    """
    declared = headers.get("content-length")
    if declared is not None and whole_number("Content-Length", declared) > max_bytes:
        raise _too_large(max_bytes)
    chunks: list[bytes] = []
    size_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        chunk: bytes = message.get("body", b"")
        size_bytes += len(chunk)
        if size_bytes > max_bytes:
            raise _too_large(max_bytes)
        hold(len(chunk))
        chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response whose body is the JSON of ``content``."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def _too_large(max_bytes: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"The body is larger than the limit of {max_bytes} bytes.", code=Code.BODY_TOO_LARGE)
