"""One connection to a server: a request goes out, its response comes in, then the next one.

httptools parses, as in uvicorn. What the server sends is bounded before it is stored: a head by its size, a body by pausing the
connection while nobody reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import httptools

MAX_HEAD_BYTES = 64 << 10
"""Maximum size of a response's status line and headers together, and of what comes between two pieces of its body, to which one
read from the socket may add."""
_AHEAD_BYTES = 128 << 10
"""How much of a body may have arrived without being read before the connection is paused."""
_PIECE_BYTES = 256 << 10
"""A connection copies what it can't send at once, so a body goes out in pieces."""
_NO_BODY = frozenset({204, 304})


class NotHttpError(ConnectionError):
    """The server sent something that isn't HTTP, or is beyond the limits."""


class Response:
    """A response whose head has arrived."""

    __slots__ = ("_chunks", "_connection", "_error", "_has_ended", "_size_bytes", "_waiting", "headers", "status")

    def __init__(self, connection: ClientConnection, status: int, headers: dict[str, str]) -> None:
        self.status = status
        self.headers = headers
        """By name in lower case. Fields of one name are joined with commas, as RFC 9110 (5.3) allows."""
        self._connection = connection
        self._chunks: list[bytes] = []
        self._size_bytes = 0
        self._has_ended = False
        self._error: OSError | None = None
        self._waiting: asyncio.Future[None] | None = None

    async def chunk(self) -> bytes:
        """Return what has arrived; empty at the end. Raises ConnectionError if the connection is lost before the end."""
        chunks = self._chunks
        while not chunks:
            if self._error is not None:
                raise self._error
            if self._has_ended:
                return b""
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        if self._size_bytes > _AHEAD_BYTES:
            self._connection.resume_reading(self)
        self._size_bytes = 0
        return data

    def close(self) -> None:
        """Break the connection off unless the response has arrived whole: then it is free already."""
        if not self._has_ended and self._error is None:
            self._connection.abort()

    # ---- what the connection calls ---------------------------------------------------------------------------------------

    def add(self, data: bytes) -> bool:
        """Take a piece of the body; return whether that is enough for now."""
        self._chunks.append(data)
        self._size_bytes += len(data)
        return self._size_bytes > _AHEAD_BYTES

    def wake(self) -> None:
        """Let the reader go on."""
        waiting = self._waiting
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    def end(self, error: OSError | None = None) -> None:
        """There is no more: it is whole, or the connection was lost."""
        self._has_ended = error is None
        self._error = error
        self.wake()


class ClientConnection(asyncio.Protocol):
    """A connection of :class:`chiasm.http.client.HttpClient`, which gives it one request at a time."""

    def __init__(
        self, on_free: Callable[[ClientConnection], None], on_lost: Callable[[ClientConnection], None]
    ) -> None:
        """``on_free`` is called when the next request may come, ``on_lost`` when none can."""
        self._on_free = on_free
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport
        self.free_since = 0.0
        """When it became free, on the loop's clock."""
        self._awaited: asyncio.Future[Response] | None = None
        """The response whose head hasn't arrived."""
        self._response: Response | None = None
        """That whose body is arriving."""
        self._headers: dict[str, str] = {}
        self._uncounted_bytes = 0
        """What has arrived since the last head or piece of a body."""
        self._ends_with_connection = False
        """Whether the body ends where the connection does."""
        self._is_sending = False
        self._may_write: asyncio.Future[None] | None = None
        self._is_paused = False
        self.lost_by: OSError | None = None
        """Why it is lost, if it is."""

    async def request(self, head: bytes, body: bytes) -> Response:
        """Send a request and return its response when the head has arrived. Cancelled, it breaks the connection off.

        Raises ConnectionError if the connection is lost first.
        """
        if self.lost_by is not None:  # before anybody could ask
            raise self.lost_by
        awaited: asyncio.Future[Response] = self._loop.create_future()
        self._awaited = awaited
        try:
            if len(body) <= _PIECE_BYTES:
                self._transport.write(head + body)
            else:
                self._transport.write(head)
                await self._send(body, awaited)
            return await awaited
        except BaseException:
            if self._awaited is awaited:
                self.abort()
            elif not awaited.cancelled() and awaited.exception() is None:
                awaited.result().close()  # cancelled just when it had come; another request may be under way by now
            raise

    def abort(self) -> None:
        """Close at once."""
        self._fail(ConnectionAbortedError("the connection was broken off"))

    def resume_reading(self, response: Response) -> None:
        """Read on if reading was paused for this response."""
        if self._is_paused and self._response is response and self.lost_by is None:
            self._is_paused = False
            self._transport.resume_reading()

    async def _send(self, body: bytes, awaited: asyncio.Future[Response]) -> None:
        """Send a body in pieces, until the server answers: what it then hasn't got, it doesn't want."""
        self._is_sending = True
        for start in range(0, len(body), _PIECE_BYTES):
            self._transport.write(body[start : start + _PIECE_BYTES])
            if self._may_write is not None:
                await self._may_write
            if awaited.done():
                return
        self._is_sending = False

    def _fail(self, error: OSError) -> None:
        """Give the connection up; whoever waits for something gets the error."""
        if self.lost_by is not None:
            return
        self.lost_by = error
        self._transport.abort()
        self._on_lost(self)
        awaited, self._awaited = self._awaited, None
        if awaited is not None and not awaited.done():
            awaited.set_exception(error)
        if self._response is not None:
            self._response.end(error)
            self._response = None
        self.resume_writing()

    # ---- what asyncio calls ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self.lost_by is not None:
            return
        self._uncounted_bytes += len(data)
        try:
            if self._awaited is None and self._response is None:
                raise NotHttpError("the server sent something that nobody asked for")
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, NotHttpError) as error:
            reason = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else error
            self._fail(NotHttpError(str(reason)))
            return
        if self._uncounted_bytes > MAX_HEAD_BYTES:
            self._fail(NotHttpError(f"a head has more than {MAX_HEAD_BYTES} bytes"))
        elif self._response is not None:
            self._response.wake()

    def eof_received(self) -> None:
        if self._awaited is None and self._response is None:
            self.abort()  # before a request goes out on it

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is None and self._response is not None and self._ends_with_connection:
            self._response.end()
            self._response = None
        self._fail(ConnectionResetError("the server closed the connection"))

    def pause_writing(self) -> None:
        self._may_write = self._loop.create_future()

    def resume_writing(self) -> None:
        waiting, self._may_write = self._may_write, None
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    # ---- what the parser calls -------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._awaited is None:
            raise NotHttpError("the server sent a second response")
        self._headers = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._response is None:  # otherwise it is a trailer
            key, text = name.decode("latin-1").lower(), value.decode("latin-1").strip(" \t")
            headers = self._headers
            headers[key] = f"{headers[key]}, {text}" if key in headers else text

    def on_headers_complete(self) -> None:
        self._uncounted_bytes = 0
        status = self._parser.get_status_code()
        if status < 200:  # the response itself comes later
            return
        headers = self._headers
        is_chunked = headers.get("transfer-encoding", "").lower().endswith("chunked")
        self._ends_with_connection = not (is_chunked or "content-length" in headers or status in _NO_BODY)
        awaited = self._awaited
        assert awaited is not None
        if awaited.done():
            raise NotHttpError("the response came when the call had just been cancelled")
        self._awaited = None
        self._response = Response(self, status, headers)
        awaited.set_result(self._response)
        if self._is_sending:
            self.resume_writing()

    def on_body(self, body: bytes) -> None:
        self._uncounted_bytes = 0
        assert self._response is not None
        if self._response.add(body) and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        self._uncounted_bytes = 0
        response = self._response
        if response is None:
            return
        self._response = None
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()
        response.end()
        is_sent = not self._is_sending and not self._transport.get_write_buffer_size()
        if not is_sent or self._ends_with_connection or not self._parser.should_keep_alive():
            self.abort()
        else:
            self.free_since = self._loop.time()
            self._on_free(self)
