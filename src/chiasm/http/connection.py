"""One connection: uvicorn's, with bounds on what it stores before a request is known, and an end that loses no answer.

uvicorn keeps header fields as they come, and closes a connection at once. Here the bytes are counted before the parser gets
them. And a connection whose client is still sending is closed in two steps: first what goes out, then, when the client has had
time to read it, the rest; a system that closes with data unread resets the connection, and the client loses the answer.
"""

from __future__ import annotations

import asyncio
import http
import uuid
from collections.abc import Callable, Hashable
from typing import Any

from chiasm.errors import (
    ChiasmError,
    Code,
    HeadTooLargeError,
    InvalidRequestError,
    OverloadedError,
    RequestTimeoutError,
)
from chiasm.http.config import HttpConfig
from chiasm.http.connections import CONNECTION, Connections, Watched, peer_of
from chiasm.http.errors import error_body, error_headers
from chiasm.http.http1 import Http1
from chiasm.http.limits import Limit

SECONDS_TO_READ = 30.0
"""Time for a client to read the end of its last answer: the pieces that the system doesn't hold for it."""
_HASTE_SECONDS = 0.5
"""Time for a client to stop sending when the server ends."""


class Connection(Http1):
    """A connection of :class:`chiasm.http.serve.HttpServer`."""

    def __init__(self, connections: Connections, handshake: Watched | None = None, **of_uvicorn: Any) -> None:
        """``handshake`` has its place until the connection is made."""
        super().__init__(**of_uvicorn)
        self._connections = connections
        self._handshake = handshake
        self._limits = connections.config
        self._socket: _Closing
        self._uncounted_bytes = 0
        """What has arrived since the last byte of a body or the end of a head: it may be stored, and it must end soon."""
        self._head_has_begun = False
        self._body_is_arriving = False
        self._reached: Limit | None = None
        """The limit on account of which nothing more is read."""
        self._is_deaf = False
        """Whether what arrives is thrown away."""
        self._unread_bytes = 0
        self._giving_up: asyncio.TimerHandle | None = None
        self._seconds_to_discard = self._limits.discard_seconds
        self._on_lost: set[Callable[[], None]] = set()

    @property
    def peer(self) -> Hashable:
        """Who is at the other end."""
        return peer_of(self.client[0]) if self.client else None

    @property
    def is_sending(self) -> bool:
        """Whether something of an answer has not gone out yet, because the client reads it slowly."""
        return self._socket.is_sending

    @property
    def has_whole_body(self) -> bool:
        """Whether the body of the last request has arrived, and so those of all before it."""
        return not self._body_is_arriving

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # ---- what asyncio calls ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._socket = _Closing(transport, self)
        super().connection_made(self._socket)  # type: ignore[arg-type]
        if self._handshake is not None:
            self._connections.leave(self._handshake)
            self._handshake = None
        limit = self._connections.admit(self)
        if limit is not None:
            self.refuse(limit)

    def data_received(self, data: bytes | memoryview) -> None:
        limits = self._limits
        if self._is_deaf or self._giving_up is not None:
            self._unread_bytes += len(data)
            if self._unread_bytes > limits.discard_bytes:
                if self._giving_up is not None:
                    self._give_up()
                else:  # the last answer is still on its way
                    self._socket.pause_reading()
                return
        while data and not self._is_deaf:
            room = limits.max_header_bytes - self._uncounted_bytes
            piece, data = (data, b"") if len(data) <= room else (data[:room], memoryview(data)[room:])
            self._uncounted_bytes += len(piece)
            super().data_received(piece)  # type: ignore[arg-type]
            if self._uncounted_bytes >= limits.max_header_bytes:
                self.refuse(Limit.HEADER_BYTES)
            elif self.headers and len(self.headers) > limits.max_header_fields:
                self.refuse(Limit.HEADER_FIELDS)
        if self._uncounted_bytes and not self._body_is_arriving and not self._is_answering:
            self._connections.note_waiting(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._giving_up is not None:
            self._giving_up.cancel()
        self._connections.leave(self)
        super().connection_lost(exc)
        for call in tuple(self._on_lost):
            call()

    # ---- what the parser calls -------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._head_has_begun = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if len(self.headers) > self._limits.max_header_fields:
            self._reached = Limit.HEADER_FIELDS
            raise _EnoughError
        if self.is_offered():
            return
        self._connections.note_busy(self)
        self._uncounted_bytes = 0
        self._head_has_begun = False
        self._body_is_arriving = True
        self.scope[CONNECTION] = self  # type: ignore[literal-required]
        super().on_headers_complete()
        self.headers = []  # for trailers, which are no part of the head

    def on_body(self, body: bytes) -> None:
        self._uncounted_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.is_offered():
            return
        self._uncounted_bytes = 0
        self._body_is_arriving = False
        if self._giving_up is not None and not self._socket.is_closing():  # all of an unread body has come
            self._giving_up.cancel()
            self._giving_up = None
            self._unread_bytes = 0
            self._connections.note_idle(self)
        super().on_message_complete()

    # ---- what uvicorn calls ----------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        self._socket.expect_head()
        super().on_response_complete()
        if self._socket.is_closing() or self._is_answering:
            return
        if self._body_is_arriving:
            self._discard()
        elif self._head_has_begun:
            self._connections.note_waiting(self)
        else:
            self._connections.note_idle(self)

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser didn't take."""
        self._refuse(_error(self._reached, self._limits) if self._reached else InvalidRequestError(msg), self._reached)

    def shutdown(self) -> None:
        self._seconds_to_discard = min(self._seconds_to_discard, _HASTE_SECONDS)
        if self._giving_up is not None and self._socket.is_closing():
            self._give_up()
        else:
            super().shutdown()

    # ---- what requests call ----------------------------------------------------------------------------------------------

    def watch(self, on_lost: Callable[[], None]) -> bool:
        """Call this when the connection is lost, until ``forget``; return False if it is lost already.

        A request calls it when its body has been read: only while something is read is an end noticed.
        """
        if self.parser is None:
            return False
        self.flow.resume_reading()
        self._on_lost.add(on_lost)
        return True

    def forget(self, on_lost: Callable[[], None]) -> None:
        """Don't call this any more."""
        self._on_lost.discard(on_lost)

    # ---- the end ---------------------------------------------------------------------------------------------------------

    def refuse(self, limit: Limit) -> None:
        """Answer that the limit was reached, if that can still be said, and close."""
        if limit is Limit.HEADER_TIMEOUT and not self._uncounted_bytes and not self._head_has_begun:
            self._socket.close()  # a client that connects in advance, and has not asked for anything
        elif not self._is_deaf:
            self._refuse(_error(limit, self._limits), limit)

    def close(self) -> None:
        """Close, because another connection needs the place."""
        self._socket.close()

    def end(self) -> None:
        """Close what goes out; read on, as long as that is allowed, if the client is sending. ``_Closing`` calls it."""
        if (self._is_deaf or self._body_is_arriving) and self._connections.may_linger(self):
            self._is_deaf = True
            self._discard()
        elif self._is_answering:  # it is broken off, and a client that doesn't read would never let the rest go out
            self._socket.abort()
        else:
            self._socket.close_now()

    def _refuse(self, error: ChiasmError, limit: Limit | None) -> None:
        if limit is not None:
            self._connections.refusals.note(limit)
        self._is_deaf = True
        if self._is_answering and (self.pipeline or not self._body_is_arriving):
            # The last answer is that to the request before this one. Reading goes on, to see whether the client leaves.
            self.cycle.keep_alive = False
            return
        if self._is_answering:  # this is the end of the request to which the answer would be
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self._socket.close_now()
                return
        body = error_body(error)
        status = http.HTTPStatus(error.status)
        fields = [
            *error_headers(error),
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
            ("x-request-id", uuid.uuid4().hex),
        ]
        head = "".join(f"{name}: {value}\r\n" for name, value in fields)
        self._socket.write(f"HTTP/1.1 {status.value} {status.phrase}\r\n{head}\r\n".encode() + body)
        self._socket.close()

    def _discard(self) -> None:
        """Read on without keeping anything, for a while."""
        if self._giving_up is None:
            self._unread_bytes = 0
            self._socket.resume_reading()
            self._giving_up = self.loop.call_later(self._seconds_to_discard, self._give_up)

    def _give_up(self) -> None:
        if not self._socket.is_closing() or self._body_is_arriving:
            self._connections.refusals.note(Limit.UNREAD_BODY)
        self._socket.close_now()


def _error(limit: Limit, limits: HttpConfig) -> ChiasmError:
    """Return what a client is told that has reached a limit of connections and heads."""
    match limit:
        case Limit.HEADER_BYTES:
            return HeadTooLargeError(
                f"The request line and the headers are larger than the limit of {limits.max_header_bytes} bytes."
            )
        case Limit.HEADER_FIELDS:
            return HeadTooLargeError(
                f"The request has more header fields than the limit of {limits.max_header_fields}."
            )
        case Limit.HEADER_TIMEOUT:
            return RequestTimeoutError(
                f"The request line and the headers did not arrive within {limits.header_timeout_seconds:g} seconds."
            )
    return OverloadedError(
        "There are as many connections as the limit allows; try again later, or use fewer.", code=Code.TOO_MANY_REQUESTS
    )


class _Closing:
    """A transport that asks its connection how to close. uvicorn uses no other methods of it than these."""

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport = transport
        self._connection = connection
        self._is_closing = False
        self._head = b""
        """The head of an answer that hasn't been sent."""
        self.write: Callable[[bytes], None] = self._hold_head
        self.get_extra_info = transport.get_extra_info
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading

    def is_closing(self) -> bool:
        return self._is_closing or self._transport.is_closing()

    @property
    def is_sending(self) -> bool:
        return bool(self._head) or self._transport.get_write_buffer_size() > 0

    def expect_head(self) -> None:
        """Let the next piece be the first of an answer, which waits for the second one, but not past this turn of the loop."""
        self._send_head()
        self.write = self._hold_head

    def _hold_head(self, data: bytes) -> None:
        self._head = data
        self.write = self._send_with_head
        self._connection.loop.call_soon(self._send_head)

    def _send_with_head(self, data: bytes) -> None:
        head, self._head = self._head, b""
        self.write = self._transport.write
        self._transport.write(head + data)

    def _send_head(self) -> None:
        if self._head:
            self._send_with_head(b"")

    def close(self) -> None:
        if not self.is_closing():
            self._is_closing = True
            self._send_head()
            self._connection.end()
            if not self._transport.is_closing() and self._transport.can_write_eof():
                self._transport.write_eof()

    def close_now(self) -> None:
        """Close when what was written has gone out, or a client has not read it for long."""
        self._is_closing = True
        self._send_head()
        self._transport.close()
        if self.is_sending:
            self._connection.loop.call_later(SECONDS_TO_READ, self._transport.abort)

    def abort(self) -> None:
        self._is_closing = True
        self._head = b""
        self._transport.abort()


class _EnoughError(Exception):
    """Makes the parser stop."""
