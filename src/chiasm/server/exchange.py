"""One HTTP request and its answer: identity, deadline, body, disconnect, errors.

An endpoint is a coroutine over an :class:`Exchange`, body read. It is cancelled when the client leaves;
whatever it raises becomes an answer with the right status, or an error event where the answer has already begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from chiasm.errors import ChiasmError, DeadlineExceededError, InvalidRequestError, PayloadTooLargeError
from chiasm.server import errors, sse
from chiasm.server.instance import Instance
from chiasm.server.timing import ServerTiming

Handler = Callable[["Exchange"], Awaitable[None]]

GRACE_SECONDS = 1.0
"""After the deadline, in which the engine may still say itself what was late."""
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_CLIENT_LEFT = 499
_serial = itertools.count()


class Exchange:
    """One request being answered."""

    def __init__(self, instance: Instance, scope: Scope, receive: Receive, send: Send) -> None:
        self.instance = instance
        self.headers = Headers(scope=scope)
        self.timing = ServerTiming()
        self.body = b""
        self.status: int | None = None
        """Of the answer, once it has begun."""
        self.deadline = self.timing.arrival + instance.config.deadline_seconds
        """In ``time.monotonic()``."""
        given = self.headers.get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.engine_id = f"{self.request_id}-{next(_serial)}"
        """Unique in this process, also where clients repeat their ids."""
        self.created = int(time.time())
        """Unix time, as answers carry it."""
        self._task: asyncio.Task[object] | None = None
        self._interruption: Exception | None = None
        self._receive = receive
        self._send = send
        self._streaming = False
        self._held_bytes = 0

    # ---- the request -------------------------------------------------------------------------------------------------

    def read_deadline(self) -> None:
        """Take the caller's deadline, if it is shorter. Raises InvalidRequestError, DeadlineExceededError."""
        left = self.headers.get("x-request-deadline-ms")
        if left is None:
            return
        try:
            milliseconds = int(left)
        except ValueError:
            raise InvalidRequestError("X-Request-Deadline-Ms must be a whole number of milliseconds.") from None
        if milliseconds <= 0:
            raise DeadlineExceededError("The request's deadline had passed when it arrived.", code="deadline_exceeded")
        self.deadline = min(self.deadline, self.timing.arrival + milliseconds / 1000)

    def until_deadline(self, grace_seconds: float = 0.0) -> asyncio.Timeout:
        """A block of code that ends with TimeoutError at the deadline."""
        return asyncio.timeout(max(0.0, self.deadline + grace_seconds - time.monotonic()))

    async def read_body(self) -> None:
        """Take in the whole body. Raises PayloadTooLargeError, OverloadedError, TimeoutError."""
        limit = self.instance.config.max_body_bytes
        too_large = PayloadTooLargeError(f"The body is larger than this instance's limit of {limit} bytes.")
        declared = self.headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared) > limit:
            raise too_large
        chunks: list[bytes] = []
        async with self.until_deadline():
            more = True
            while more:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    raise _ClientLeftError
                chunk = message.get("body", b"")
                if self._held_bytes + len(chunk) > limit:
                    raise too_large
                self.instance.hold_body_bytes(len(chunk))
                self._held_bytes += len(chunk)
                chunks.append(chunk)
                more = message.get("more_body", False)
        self.body = chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def release_body(self) -> None:
        """The body is not needed any more."""
        self.body = b""
        self.instance.hold_body_bytes(-self._held_bytes)
        self._held_bytes = 0

    # ---- the answer --------------------------------------------------------------------------------------------------

    async def reply(
        self,
        body: bytes,
        *,
        status: int = 200,
        content_type: str = "application/json",
        headers: Iterable[tuple[str, str]] = (),
    ) -> None:
        """Send the whole answer."""
        await self._start(status, content_type, [("content-length", str(len(body))), *headers])
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def start_events(self, headers: Iterable[tuple[str, str]] = ()) -> None:
        """Begin a stream of server-sent events; from here on the status is 200."""
        self._streaming = True
        # The last header keeps nginx from holding events back.
        steady = [("cache-control", "no-cache"), ("x-accel-buffering", "no")]
        await self._start(200, sse.CONTENT_TYPE, [*steady, *headers])

    async def write(self, events: bytes) -> None:
        """Send framed events."""
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def end_events(self, events: bytes = b"") -> None:
        """Send the last events and end the stream."""
        self._streaming = False
        await self._send({"type": "http.response.body", "body": events, "more_body": False})

    async def fail(self, error: ChiasmError) -> None:
        """Answer with an error: with its status if nothing was sent yet, else as the stream's last event."""
        if self.status is None:
            timing = ("server-timing", self.timing.header(None, ended=True))
            headers = [timing, *errors.headers_of(error)]
            await self.reply(errors.body_of(error), status=error.status, headers=headers)
        elif self._streaming:
            self.instance.metrics.stream_errors.inc()
            await self.end_events(sse.event(errors.body_of(error)))

    async def _start(self, status: int, content_type: str, headers: Iterable[tuple[str, str]]) -> None:
        self.status = status
        raw = [(b"content-type", content_type.encode()), (b"x-request-id", self.request_id.encode())]
        raw += [(name.encode(), value.encode()) for name, value in headers]
        message: Message = {"type": "http.response.start", "status": status, "headers": raw}
        await self._send(message)

    # ---- interruption ------------------------------------------------------------------------------------------------

    def interrupt(self, reason: Exception) -> None:
        """Break off what answers the request; it ends with ``reason``."""
        if self._task is not None and self._interruption is None:
            self._interruption = reason
            self._task.cancel()

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """The block that ``interrupt`` breaks off."""
        self._task = asyncio.current_task()
        assert self._task is not None
        try:
            yield
        except asyncio.CancelledError:
            if self._interruption is not None and self._task.uncancel() == 0:
                raise self._interruption from None
            raise
        finally:
            self._task = None

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """A block that is interrupted when the client closes its connection; the body has been read."""

        async def watch() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            self.interrupt(_ClientLeftError())

        watcher = asyncio.create_task(watch())
        try:
            yield
        finally:
            watcher.cancel()


class _ClientLeftError(Exception):
    """The client closed its connection before the answer was complete."""


class Endpoint:
    """An ASGI application around the handler of one path that takes a body."""

    def __init__(self, instance: Instance, path: str, handler: Handler) -> None:
        self._instance = instance
        self._path = path
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(self._instance, scope, receive, send)
        metrics = self._instance.metrics
        metrics.in_flight.inc()
        left = False
        try:
            await self._answer(exchange)
        except _ClientLeftError:
            left = True
        except Exception as error:
            await _fail(exchange, errors.as_chiasm_error(error))
        finally:
            exchange.release_body()
            metrics.in_flight.dec()
            status = _CLIENT_LEFT if left or exchange.status is None else exchange.status
            metrics.requests.labels(self._path, str(status)).inc()
            metrics.end_to_end.labels(self._path).observe(time.monotonic() - exchange.timing.arrival)

    async def _answer(self, exchange: Exchange) -> None:
        self._instance.check_ready()
        exchange.read_deadline()
        with self._instance.admitted(exchange), exchange.interruptible():
            await exchange.read_body()
            async with exchange.until_deadline(GRACE_SECONDS), exchange.watched():
                await self._handler(exchange)


async def _fail(exchange: Exchange, error: ChiasmError) -> None:
    # A client that doesn't read would hold this up for ever.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GRACE_SECONDS):
            await exchange.fail(error)
