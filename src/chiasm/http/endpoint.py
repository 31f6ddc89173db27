"""The life of one request, from its head to its answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.types import Receive, Scope, Send

from chiasm.errors import ChiasmError
from chiasm.http.admission import Admission
from chiasm.http.body import PACE, ClientLeftError, Pace
from chiasm.http.errors import as_chiasm_error
from chiasm.http.exchange import Exchange
from chiasm.http.log import CLIENT_LEFT

Handler = Callable[[Exchange], Awaitable[None]]

_FAIL_SECONDS = 1.0
"""Time for a client to read an error: one that doesn't read would hold its request forever."""


@dataclass(frozen=True)
class Bounds:
    """What one request may take."""

    deadline_seconds: float
    """Time from its arrival to the last byte of its answer."""
    max_body_bytes: int
    pace: Pace = PACE
    grace_seconds: float = 0.0
    """Time after the deadline for the handler to raise a more precise error itself."""


class Endpoint:
    """An ASGI application around a handler of requests with a body.

    The handler runs with the body read, and is cancelled when the client leaves, at the deadline and by
    ``Admission.interrupt_all``. Whatever it raises becomes an answer with the right status, or the last event of a stream.
    """

    def __init__(
        self,
        handler: Handler,
        admission: Admission,
        bounds: Bounds,
        *,
        on_start: Callable[[Exchange], None] = lambda exchange: None,
        on_error: Callable[[Exchange, ChiasmError], None] = lambda exchange, error: None,
        on_end: Callable[[Exchange], None] = lambda exchange: None,
    ) -> None:
        """``on_start`` is called first and may raise to refuse the request, ``on_error`` before an error is sent, and
        ``on_end`` last, with the status in the exchange."""
        self._handler = handler
        self._admission = admission
        self._bounds = bounds
        self._on_start = on_start
        self._on_error = on_error
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self._admission, deadline_seconds=self._bounds.deadline_seconds)
        exchange.visit.asks_for_answer = True
        try:
            await self._answer(exchange)
        except ClientLeftError:
            exchange.status = CLIENT_LEFT
        except Exception as error:
            await self._fail(exchange, as_chiasm_error(error))
        finally:
            exchange.status = exchange.status or CLIENT_LEFT
            self._on_end(exchange)

    async def _answer(self, exchange: Exchange) -> None:
        bounds = self._bounds
        self._on_start(exchange)
        exchange.read_deadline()
        with exchange:
            exchange.end_at_deadline()
            try:
                self._admission.begin_reading(exchange)
                await exchange.read_body(max_bytes=bounds.max_body_bytes, pace=bounds.pace)
                self._admission.begin_answering(exchange)
                exchange.end_when_client_leaves()
                if bounds.grace_seconds:
                    exchange.end_at_deadline(bounds.grace_seconds)
                await self._handler(exchange)
            finally:
                self._admission.leave(exchange)

    async def _fail(self, exchange: Exchange, error: ChiasmError) -> None:
        if error.limit is not None:
            self._admission.refusals.note(error.limit)
        self._on_error(exchange, error)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAIL_SECONDS):
                await exchange.fail(error)
