"""Bodies: a request's, read within bounds, and a JSON response's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import msgspec
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive

from chiasm.errors import Code, PayloadTooLargeError, UnsupportedMediaTypeError
from chiasm.http.encoding import Decompressor, decompressor
from chiasm.http.untrusted import whole_number

_SHOWN_CHARACTERS = 40
_UNSPECIFIC = ("", "application/octet-stream")
"""Media types that say nothing about a body."""


class ClientLeftError(Exception):
    """The client closed its connection, so nobody would read an answer."""


async def read_body(
    receive: Receive, headers: Headers, max_bytes: int, hold: Callable[[int], None] = lambda size_bytes: None
) -> bytes:
    """Return the whole JSON body, decompressed, of at most ``max_bytes`` before and after that.

    ``hold`` is told the size of every chunk before it is kept, and may raise to refuse it. Raises UnsupportedMediaTypeError
    and, for a declared length, PayloadTooLargeError before anything is read, InvalidRequestError for a corrupt
    ``Content-Encoding`` or length, and ClientLeftError.
    """
    _check_media_type(headers.get("content-type", ""))
    compression = decompressor(", ".join(headers.getlist("content-encoding")))
    declared = headers.get("content-length")
    if declared is not None and whole_number("Content-Length", declared) > max_bytes:
        raise _too_large(max_bytes)
    chunks: list[bytes] = []
    size_bytes = 0
    received = _received(receive, max_bytes)
    async for chunk in received if compression is None else _decompressed(received, compression):
        size_bytes += len(chunk)
        if size_bytes > max_bytes:
            raise _too_large(max_bytes)
        hold(len(chunk))
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def _received(receive: Receive, max_bytes: int) -> AsyncIterator[bytes]:
    size_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        chunk: bytes = message.get("body", b"")
        size_bytes += len(chunk)
        if size_bytes > max_bytes:
            raise _too_large(max_bytes)
        yield chunk
        if not message.get("more_body", False):
            return


async def _decompressed(received: AsyncIterator[bytes], compression: Decompressor) -> AsyncIterator[bytes]:
    async for chunk in received:
        for piece in compression.feed(chunk):
            yield piece
            await asyncio.sleep(0)  # others get their turn
    compression.end()


def _check_media_type(content_type: str) -> None:
    """Raise UnsupportedMediaTypeError for a ``Content-Type`` that names something else than JSON."""
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type not in _UNSPECIFIC and media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaTypeError(
            f"The Content-Type of the body is {media_type[:_SHOWN_CHARACTERS]!r}; send JSON, with the header Content-Type: "
            "application/json.",
            code=Code.UNSUPPORTED_MEDIA_TYPE,
        )


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response whose body is the JSON of ``content``."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def _too_large(max_bytes: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"The body is larger than the limit of {max_bytes} bytes.", code=Code.BODY_TOO_LARGE)
