"""Bodies: a request's, read within bounds, and a JSON response's."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Message, Receive

from chiasm.errors import Code, PayloadTooLargeError, RequestTimeoutError, UnsupportedMediaTypeError
from chiasm.http.config import HttpConfig
from chiasm.http.encoding import decompressor
from chiasm.http.json_size import INLINE_BYTES
from chiasm.http.limits import Limit
from chiasm.http.untrusted import whole_number

_SHOWN_CHARACTERS = 40
_UNSPECIFIC = ("", "application/octet-stream")
"""Media types that say nothing about a body."""
_MARK = b"\xef\xbb\xbf"
"""What some programs, of Windows above all, put before a text in UTF-8."""


class ClientLeftError(Exception):
    """The client closed its connection, so nobody would read an answer."""


class Holder(Protocol):
    """Counts the bytes that are in memory for a request: :class:`chiasm.http.Exchange`."""

    def hold(self, size_bytes: int) -> None:
        """Called before they are kept; may raise to refuse them."""

    def give_back(self, size_bytes: int) -> None:
        """Called when they aren't kept any longer."""


@dataclass(frozen=True)
class Pace:
    """How fast a body must arrive."""

    timeout_seconds: float = 60.0
    """Time for the whole body."""
    min_bytes_per_second: float = 1024.0
    """On the average since the head, once ``grace_seconds`` have passed; 0: any."""
    grace_seconds: float = 10.0

    def seconds_for_more(self, received_bytes: int) -> float:
        """Return how long after the head more must have come than these bytes."""
        if not self.min_bytes_per_second:
            return self.timeout_seconds
        return min(self.timeout_seconds, max(self.grace_seconds, received_bytes / self.min_bytes_per_second))


PACE = Pace()


def pace_of(config: HttpConfig) -> Pace:
    """Return the pace that a server asks for."""
    return Pace(config.body_timeout_seconds, config.min_body_bytes_per_second)


class Incoming:
    """Receives one request, and notes whether all of it has come. For servers that close a connection at once."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._is_whole = False

    async def __call__(self) -> Message:
        """Receive a message, as ASGI's ``receive`` does."""
        message = await self._receive()
        self._is_whole = not message.get("more_body", False)  # also when the client has left
        return message

    async def discard(self, seconds: float, max_bytes: int) -> None:
        """Read on for so long and so much, and keep nothing, so that the client sees an answer and not a reset."""
        size_bytes = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._is_whole and size_bytes <= max_bytes:
                    size_bytes += len((await self()).get("body", b""))


async def read_body(
    receive: Receive, headers: Headers, max_bytes: int, *, holder: Holder | None = None, pace: Pace | None = PACE
) -> bytes:
    """Return the whole JSON body, decompressed and without a byte order mark, of at most ``max_bytes`` before and after that.

    ``holder`` is told of all that is in memory for it, and may refuse. ``pace`` is None for a body that has arrived: a timer
    costs more than to read a small one. Raises UnsupportedMediaTypeError and, for a declared length, PayloadTooLargeError
    before anything is read, InvalidRequestError for a corrupt ``Content-Encoding`` or length, RequestTimeoutError and
    ClientLeftError.
    """
    _check_media_type(headers.get("content-type", ""))
    compression = (
        decompressor(", ".join(headers.getlist("content-encoding"))) if "content-encoding" in headers else None
    )
    declared = headers.get("content-length")
    if declared is not None and whole_number("Content-Length", declared) > max_bytes:
        raise _too_large(max_bytes)
    if pace is not None:
        receive = _Paced(receive, pace)
    kept = _Kept(max_bytes, holder)
    received_bytes = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        chunk: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        received_bytes += len(chunk)
        if received_bytes > max_bytes:
            raise _too_large(max_bytes)
        if compression is None:
            kept.add(chunk)
            continue
        for piece in compression.feed(chunk):
            kept.add(piece)
            await asyncio.sleep(0)  # others get their turn
    if compression is not None:
        compression.end()
    return await kept.joined()


class _Paced:
    """Receives a body that must arrive at a pace."""

    def __init__(self, receive: Receive, pace: Pace) -> None:
        self._receive = receive
        self._pace = pace
        self._began = asyncio.get_running_loop().time()
        self._received_bytes = 0

    async def __call__(self) -> Message:
        """Receive a message, as ASGI's ``receive`` does. Raises RequestTimeoutError."""
        seconds = self._pace.seconds_for_more(self._received_bytes)
        try:
            async with asyncio.timeout_at(self._began + seconds) as limit:
                message = await self._receive()
        except TimeoutError:
            if not limit.expired():
                raise
            raise _too_slow(self._pace, seconds) from None
        self._received_bytes += len(message.get("body", b""))
        return message


class _Kept:
    """The pieces of a body as it is kept, decompressed."""

    def __init__(self, max_bytes: int, holder: Holder | None) -> None:
        self._max_bytes = max_bytes
        self._holder = holder
        self._chunks: list[bytes] = []
        self._size_bytes = 0

    def add(self, chunk: bytes) -> None:
        """Keep one more. Raises PayloadTooLargeError, and what the holder raises."""
        if not chunk:
            return
        self._size_bytes += len(chunk)
        if self._size_bytes > self._max_bytes:
            raise _too_large(self._max_bytes)
        if self._holder is not None:
            self._holder.hold(len(chunk))
        self._chunks.append(chunk)

    async def joined(self) -> bytes:
        """Return the body without a byte order mark."""
        chunks = self._chunks
        if chunks and b"".join(chunks[: len(_MARK)]).startswith(_MARK):
            chunks = _without_mark(chunks)
        return await joined(chunks, self._size_bytes)


async def joined(chunks: Sequence[bytes], size_bytes: int) -> bytes:
    """Return the bytes of all pieces, ``size_bytes`` together; many are joined beside the event loop, which isn't held."""
    if size_bytes <= INLINE_BYTES:
        return b"".join(chunks)
    return await asyncio.to_thread(b"".join, chunks)


def _without_mark(chunks: Sequence[bytes]) -> list[bytes]:
    left = len(_MARK)
    rest: list[bytes] = []
    for chunk in chunks:
        rest.append(chunk[left:] if left else chunk)
        left -= min(left, len(chunk))
    return rest


def _check_media_type(content_type: str) -> None:
    """Raise UnsupportedMediaTypeError for a ``Content-Type`` that names something else than JSON."""
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type not in _UNSPECIFIC and media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaTypeError(
            f"The Content-Type of the body is {media_type[:_SHOWN_CHARACTERS]!r}; send JSON, and add the header "
            "'Content-Type: application/json' (curl: -H 'Content-Type: application/json').",
            code=Code.UNSUPPORTED_MEDIA_TYPE,
        )


def replayed(body: bytes, receive: Receive) -> Receive:
    """Return the ``receive`` of an application that has yet to read a body that was read here."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return left.pop() if left else await receive()

    return receive_again


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response whose body is the JSON of ``content``."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def _too_large(max_bytes: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(
        f"The body is larger than the limit of {max_bytes} bytes.", code=Code.BODY_TOO_LARGE, limit=Limit.BODY_BYTES
    )


def _too_slow(pace: Pace, seconds: float) -> RequestTimeoutError:
    if seconds >= pace.timeout_seconds:
        message, limit = f"The body did not arrive within {pace.timeout_seconds:g} seconds.", Limit.BODY_TIMEOUT
    else:
        message, limit = (
            f"The body arrived more slowly than {pace.min_bytes_per_second:g} bytes a second.",
            Limit.BODY_RATE,
        )
    return RequestTimeoutError(message, limit=limit)
