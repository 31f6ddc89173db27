"""One HTTP request and its answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import Protocol

from starlette.types import Receive, Scope, Send

from chiasm.errors import ChiasmError, Code, DeadlineExceededError
from chiasm.http import events
from chiasm.http.admission import Admission
from chiasm.http.body import ClientLeftError, Pace, read_body
from chiasm.http.connections import CONNECTION
from chiasm.http.errors import error_body, error_headers
from chiasm.http.fleet_calls import caller_of
from chiasm.http.timing import TimingEntry
from chiasm.http.untrusted import whole_number
from chiasm.http.visit import visit_of

_PIECE_BYTES = 256 << 10


class Connection(Protocol):
    """What a request asks of the connection over which it came: :class:`chiasm.http.connection.Connection`."""

    @property
    def has_whole_body(self) -> bool:
        """Whether the body of the last request has arrived, and so those of all before it."""

    def watch(self, on_lost: Callable[[], None]) -> bool:
        """Call this when the connection is lost, until ``forget``; return False if it is lost already."""

    def forget(self, on_lost: Callable[[], None]) -> None:
        """Don't call this any more."""


class Exchange:
    """One request being answered. Compared by identity. ``with`` it, the work on it is done, which ``interrupt`` ends."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, admission: Admission, *, deadline_seconds: float
    ) -> None:
        """``deadline_seconds`` is the longest that the request may take; its client may ask for less."""
        self.arrival = time.monotonic()
        visit = visit_of(scope)
        self.headers = visit.headers
        self.visit = visit
        self.request_id = visit.request_id
        self.key = visit.key
        """Whose API key the request has; None if the server needs none."""
        self.timing_comments = visit.timing_comments
        """Whether a stream may contain comments with timing."""
        self.deadline = self.arrival + deadline_seconds
        """On the clock of ``time.monotonic``."""
        self.caller = caller_of(scope)
        """Whether a process of the fleet sends it."""
        self.body = b""
        self.status: int | None = None
        """Status of the answer, once it has begun; CLIENT_LEFT if the client has gone."""
        self.timing: list[TimingEntry] = []
        """Where the time went, as far as it is known: the ``Server-Timing`` of the answer or of an error."""
        self.error_headers: Iterable[tuple[str, str]] = ()
        """Headers that an answer with an error carries besides its own."""
        self._path: str = scope["path"]
        self._receive = receive
        self._send = send
        self._admission = admission
        self.held_bytes = 0
        """What it holds now; ``hold``, ``give_back`` and ``release`` change it."""
        self._is_streaming = False
        self._is_whole = False
        """Whether the last events say that the stream is whole."""
        self._is_complete = False
        self._task: asyncio.Task[object] | None = None
        self._interruption: Exception | None = None
        self._at_deadline: asyncio.TimerHandle | None = None
        self._connection: Connection = scope[CONNECTION]

    # ---- the request ---------------------------------------------------------------------------------------------------

    def read_deadline(self) -> None:
        """Take the client's deadline if it is earlier. Raises InvalidRequestError, DeadlineExceededError."""
        given = self.headers.get("x-request-deadline-ms")
        if given is None:
            return
        milliseconds = whole_number("X-Request-Deadline-Ms", given)
        if milliseconds <= 0:
            raise DeadlineExceededError(
                "The deadline of the request had passed when it arrived.", code=Code.DEADLINE_EXCEEDED
            )
        self.deadline = min(self.deadline, self.arrival + milliseconds / 1000)

    @property
    def seconds_left(self) -> float:
        """Time until the deadline; never negative."""
        return max(0.0, self.deadline - time.monotonic())

    @contextlib.asynccontextmanager
    async def until_deadline(self) -> AsyncIterator[None]:
        """A block that ends at the deadline. Raises DeadlineExceededError."""
        try:
            async with asyncio.timeout(self.seconds_left) as limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise _deadline_passed() from None

    async def read_body(self, *, max_bytes: int, pace: Pace) -> None:
        """Read ``body``. Raises PayloadTooLargeError, RequestTimeoutError, OverloadedError, ClientLeftError."""
        time_limit = None if self._connection.has_whole_body else pace
        self.body = await read_body(self._receive, self.headers, max_bytes, holder=self, pace=time_limit)

    def hold(self, size_bytes: int) -> None:
        """Count bytes that the request keeps in memory.

        Raises PayloadTooLargeError if it holds too many, OverloadedError if all requests together do.
        """
        self._admission.hold(self, size_bytes)

    def give_back(self, size_bytes: int) -> None:
        """Stop counting some of the bytes."""
        self._admission.release(self, min(size_bytes, self.held_bytes))

    def release(self, *, keep_bytes: int = 0) -> None:
        """Stop counting bytes, down to ``keep_bytes``, and forget the body if none are kept."""
        self.give_back(max(0, self.held_bytes - keep_bytes))
        if not self.held_bytes:
            self.body = b""

    # ---- the answer ----------------------------------------------------------------------------------------------------

    @property
    def has_begun(self) -> bool:
        """Whether the client has the head of the answer."""
        return self.status is not None

    @property
    def is_streaming(self) -> bool:
        """Whether a stream of events has begun and not ended."""
        return self._is_streaming

    async def reply(
        self,
        body: bytes,
        *,
        status: int = 200,
        content_type: str = "application/json",
        headers: Iterable[tuple[str, str]] = (),
    ) -> None:
        """Send the whole answer, in pieces: while the client doesn't read, it is in flight, and ends at the deadline."""
        await self._start(status, content_type, [("content-length", str(len(body))), *headers])
        last = max(0, len(body) - 1) // _PIECE_BYTES * _PIECE_BYTES
        for start in range(0, last, _PIECE_BYTES):
            await self.write(body[start : start + _PIECE_BYTES])
        await self._send_last(body[last:])

    async def start_events(
        self, headers: Iterable[tuple[str, str]] = (), *, content_type: str = events.CONTENT_TYPE
    ) -> None:
        """Begin a stream of server-sent events; from here on the status is 200."""
        self._is_streaming = True
        # The last header keeps nginx from buffering events.
        steady = [("cache-control", "no-cache"), ("x-accel-buffering", "no")]
        await self._start(200, content_type, [*steady, *headers])

    async def write(self, data: bytes) -> None:
        """Send whole events; nothing if there are none."""
        if data:
            self._is_whole = data.endswith(events.ENDS)
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_events(self, data: bytes = b"") -> None:
        """Send the last events and end the stream."""
        self._is_streaming = False
        await self._send_last(data)

    async def fail(self, error: ChiasmError) -> None:
        """Answer with an error: with its status if the answer has not begun, otherwise as the stream's last event.

        A stream that is whole ends without one, whatever keeps its server from ending it.
        """
        if self.status is None:
            await self.reply(
                error_body(error), status=error.status, headers=[*error_headers(error), *self.error_headers]
            )
        elif self._is_streaming:
            await self.end_events(b"" if self._is_whole else events.error_event(error_body(error), self._path))

    async def _send_last(self, data: bytes) -> None:
        # Before the client has the answer: its next request finds the place free.
        self._admission.leave(self)
        await self._send({"type": "http.response.body", "body": data, "more_body": False})
        self._is_complete = True

    async def _start(self, status: int, content_type: str, headers: Iterable[tuple[str, str]]) -> None:
        self.status = status
        raw = [(b"content-type", content_type.encode("latin-1", "replace"))]
        raw += [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    # ---- interruption --------------------------------------------------------------------------------------------------

    def interrupt(self, reason: Exception) -> None:
        """End the work on the request; ``reason`` is raised where it is done."""
        if self._task is not None and self._interruption is None:
            self._interruption = reason
            self._task.cancel()

    def __enter__(self) -> Exchange:
        self._task = asyncio.current_task()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        assert task is not None
        if self._at_deadline is not None:
            self._at_deadline.cancel()
        self._connection.forget(self._note_client_left)
        if isinstance(value, asyncio.CancelledError) and self._interruption is not None and task.uncancel() == 0:
            raise self._interruption from None

    def end_at_deadline(self, grace_seconds: float = 0.0) -> None:
        """From now on the deadline, or so long after it, interrupts with DeadlineExceededError."""
        if self._at_deadline is not None:
            self._at_deadline.cancel()
        loop = asyncio.get_running_loop()
        self._at_deadline = loop.call_later(self.seconds_left + grace_seconds, self._note_deadline)

    def end_when_client_leaves(self) -> None:
        """From now on ClientLeftError interrupts when the client closes its connection; the body has been read.

        Raises it if the client has left.
        """
        if not self._connection.watch(self._note_client_left):
            raise ClientLeftError

    def _note_deadline(self) -> None:
        self.interrupt(_deadline_passed())

    def _note_client_left(self) -> None:
        if not self._is_complete:
            self.interrupt(ClientLeftError())


def _deadline_passed() -> DeadlineExceededError:
    return DeadlineExceededError(
        "The deadline of the request passed before it was answered.", code=Code.DEADLINE_EXCEEDED
    )
