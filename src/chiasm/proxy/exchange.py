"""One request and its answer: the body within bounds, the client's leaving noticed, one answer sent."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

from starlette.types import Message, Receive, Scope, Send

from chiasm.errors import ChiasmError, InvalidRequestError, OverloadedError, PayloadTooLargeError
from chiasm.proxy.admission import Ticket
from chiasm.proxy.relay import EventRelay, error_body
from chiasm.proxy.timing import Timing
from chiasm.proxy.upstream import Answer, AnsweredError

_REQUEST_ID = re.compile(rb"[0-9A-Za-z._:-]{1,100}")
_PASSED_ON = (b"authorization", b"traceparent", b"tracestate")
_PASSED_BACK = ("content-type", "retry-after", "www-authenticate")
CLIENT_CLOSED = 499
"""What a request whose client left is counted as."""


class ClientGoneError(Exception):
    """The client closed its connection; nobody reads an answer."""


class RequestTimeoutError(InvalidRequestError):
    """The client did not send its body in time."""

    status = 408


class Exchange:
    """What is read from and sent to one client."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.timing = Timing()
        self._relay: EventRelay | None = None
        self.status: int | None = None
        """The status that was sent; None as long as none was."""
        given = self.headers.get(b"x-request-id", b"")
        self.request_id = given.decode() if _REQUEST_ID.fullmatch(given) else os.urandom(16).hex()

    @property
    def has_begun(self) -> bool:
        """Whether the client has the head of a stream."""
        return self._relay is not None

    def passed_on(self) -> dict[str, str]:
        """Headers that instances get to see."""
        return {name.decode(): self.headers[name].decode("latin-1") for name in _PASSED_ON if name in self.headers}

    async def read_body(self, ticket: Ticket, *, max_bytes: int, timeout_seconds: float) -> bytes:
        """The whole body. Raises PayloadTooLargeError, RequestTimeoutError, OverloadedError, ClientGoneError."""
        length = self.headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > max_bytes:
            raise _too_large(max_bytes)
        chunks: list[bytes] = []
        size_bytes = 0
        try:
            async with asyncio.timeout(timeout_seconds):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    chunk: bytes = message.get("body", b"")
                    size_bytes += len(chunk)
                    if size_bytes > max_bytes:
                        raise _too_large(max_bytes)
                    ticket.hold(len(chunk))
                    chunks.append(chunk)
                    if not message.get("more_body"):
                        return b"".join(chunks)
        except TimeoutError:
            raise RequestTimeoutError(f"the body did not arrive within {timeout_seconds:g} s") from None

    @asynccontextmanager
    async def until_client_leaves(self) -> AsyncIterator[None]:
        """Cancels what is inside when the client closes its connection, and raises ClientGoneError then."""
        task = asyncio.current_task()
        assert task is not None
        gone = False

        async def watch() -> None:
            nonlocal gone
            while (await self._receive())["type"] != "http.disconnect":
                pass
            gone = True
            task.cancel()

        watcher = asyncio.create_task(watch())
        try:
            yield
        except asyncio.CancelledError:
            if gone and not task.uncancel():
                raise ClientGoneError from None
            raise
        finally:
            watcher.cancel()

    async def answer(self, answer: Answer) -> None:
        """Send an instance's answer as it is."""
        headers = [
            (name.encode(), value.encode("latin-1", "replace"))
            for name in _PASSED_BACK
            if (value := answer.headers.get(name)) is not None
        ]
        if answer.status == 503 and "retry-after" not in answer.headers:
            headers.append((b"retry-after", b"1"))
        await self._send_whole(answer.status, headers, answer.body, answer.headers)

    async def start_stream(self, upstream: Mapping[str, str]) -> None:
        """Send the head of a stream of events."""
        content_type = upstream.get("content-type", "text/event-stream").encode("latin-1", "replace")
        await self._start(200, [(b"content-type", content_type), (b"cache-control", b"no-cache")], upstream)
        self._relay = EventRelay(self.timing)

    async def send_events(self, chunk: bytes) -> None:
        """Pass a chunk of a stream on."""
        assert self._relay is not None
        await self._send_chunk(self._relay.pass_on(chunk))

    async def end_stream(self) -> None:
        assert self._relay is not None
        await self._send_chunk(self._relay.finish(), last=True)

    async def send_stream(
        self, upstream: Mapping[str, str], chunk: bytes, next_chunk: Callable[[], Awaitable[bytes]]
    ) -> None:
        """Pass on a stream that begins with ``chunk``, from its head to its end."""
        await self.start_stream(upstream)
        while chunk:
            await self.send_events(chunk)
            chunk = await next_chunk()
        await self.end_stream()

    async def fail(self, error: ChiasmError) -> None:
        """Send an error as the OpenAI API shows it; where a stream has begun, as its last event."""
        if self._relay is not None:
            await self._send_chunk(self._relay.fail(error), last=True)
        elif self.status is not None:
            return  # the answer is out
        elif isinstance(error, AnsweredError):
            await self.answer(error.answer)
        else:
            headers = [(b"content-type", b"application/json")]
            if error.status == 503:
                seconds = error.retry_after_seconds if isinstance(error, OverloadedError) else 1
                headers.append((b"retry-after", str(seconds).encode()))
            await self._send_whole(error.status, headers, error_body(error), {})

    async def _send_chunk(self, chunk: bytes, *, last: bool = False) -> None:
        if chunk or last:
            await self._send({"type": "http.response.body", "body": chunk, "more_body": not last})

    async def _send_whole(
        self, status: int, headers: list[tuple[bytes, bytes]], body: bytes, upstream: Mapping[str, str]
    ) -> None:
        await self._start(status, [*headers, (b"content-length", str(len(body)).encode())], upstream)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]], upstream: Mapping[str, str]) -> None:
        self.status = status
        message: Message = {
            "type": "http.response.start",
            "status": status,
            "headers": [
                *headers,
                (b"x-request-id", self.request_id.encode()),
                (b"server-timing", self.timing.header(upstream.get("server-timing")).encode("latin-1", "replace")),
            ],
        }
        await self._send(message)


def _too_large(max_bytes: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"the body is larger than {max_bytes:,} bytes", code="body_too_large")
