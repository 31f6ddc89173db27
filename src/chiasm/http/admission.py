"""Bounds on all requests of a server together: how many are being answered, and how many bytes they hold.

A place among those being answered is for a request whose body is there. Bytes count from the first one that arrives.
"""

from __future__ import annotations

import time
from typing import Protocol

from chiasm.errors import Code, OverloadedError, PayloadTooLargeError
from chiasm.http.config import HttpConfig
from chiasm.http.limits import Limit, Refusals

_FULL = "The requests being answered hold as much data as the limit allows; try again later."
_PATIENCE_SECONDS = 10.0
"""A body that has been arriving for longer gives way when its bytes are needed for others."""


class Admitted(Protocol):
    """A request: :class:`chiasm.http.Exchange`."""

    arrival: float
    held_bytes: int
    """What it holds now. Only Admission changes it."""

    def release(self) -> None:
        """Give back all bytes that it still holds."""

    def interrupt(self, reason: Exception) -> None:
        """End the work on it with an error."""


class Admission:
    """The requests that are being read and answered; one beyond the bounds is refused with ``Retry-After``."""

    def __init__(
        self,
        max_requests: int,
        max_held_bytes: int,
        config: HttpConfig,
        refusals: Refusals,
    ) -> None:
        """``config`` says what one request may hold of ``max_held_bytes``, and what is kept for small ones."""
        self.refusals = refusals
        self._max_requests = max_requests
        self._max_held_bytes = max_held_bytes
        self._max_bytes_of_large = max_held_bytes - int(max_held_bytes * config.small_request_share)
        self._max_bytes_of_one = max(int(max_held_bytes * config.max_request_share), config.small_request_bytes)
        self._small_bytes = config.small_request_bytes
        self._held_bytes = 0
        self.released_bytes = 0
        """How many bytes requests have released since the start."""
        self._reading: dict[Admitted, None] = {}
        self._answered: set[Admitted] = set()

    @property
    def requests(self) -> int:
        """How many requests are being read or answered."""
        return len(self._reading) + len(self._answered)

    @property
    def held_bytes(self) -> int:
        """How many bytes of bodies and media they hold."""
        return self._held_bytes

    def begin_reading(self, exchange: Admitted) -> None:
        """Note that the body of the exchange arrives from now on, which takes no place.

        Raises OverloadedError if there would be no place for it now.
        """
        self._check_place()
        self._reading[exchange] = None

    def begin_answering(self, exchange: Admitted) -> None:
        """Count the exchange, whose body is there, as being answered until ``leave``. Raises OverloadedError."""
        self._check_place()
        self._reading.pop(exchange, None)
        self._answered.add(exchange)

    def leave(self, exchange: Admitted) -> None:
        """Free the place and the bytes that the exchange holds; does nothing the second time. Each exchange must call it."""
        self._reading.pop(exchange, None)
        self._answered.discard(exchange)
        exchange.release()

    def hold(self, exchange: Admitted, size_bytes: int) -> None:
        """Count more bytes as held by the exchange.

        Raises PayloadTooLargeError if it would hold more than its share, and OverloadedError if all requests together would
        hold too much, also after bodies that have been arriving for long gave way.
        """
        held = exchange.held_bytes + size_bytes
        if held > self._max_bytes_of_one:
            raise PayloadTooLargeError(
                f"The request, with its images, needs more than the {self._max_bytes_of_one} bytes of memory that one request "
                "may take; send fewer or smaller images.",
                code=Code.REQUEST_TOO_LARGE,
                limit=Limit.REQUEST_SHARE,
            )
        room = self._max_held_bytes if held <= self._small_bytes else self._max_bytes_of_large
        while self._held_bytes + size_bytes > room:
            self._make_way(exchange)
        self._held_bytes += size_bytes
        exchange.held_bytes = held

    def release(self, exchange: Admitted, size_bytes: int) -> None:
        """Count bytes as no longer held by the exchange."""
        self._held_bytes -= size_bytes
        self.released_bytes += size_bytes
        exchange.held_bytes -= size_bytes

    def interrupt_all(self, reason: Exception) -> None:
        """End all requests with an error."""
        for exchange in [*self._reading, *self._answered]:
            exchange.interrupt(reason)

    def _check_place(self) -> None:
        if len(self._answered) >= self._max_requests:
            raise OverloadedError(
                f"{len(self._answered)} requests are being answered, which is the limit; try again later.",
                code=Code.TOO_MANY_REQUESTS,
                limit=Limit.REQUESTS,
            )

    def _make_way(self, exchange: Admitted) -> None:
        """End the oldest request whose body has been arriving for long and is large. Raises OverloadedError if none has."""
        before = time.monotonic() - _PATIENCE_SECONDS
        for other in self._reading:  # in order of arrival
            if other.arrival > before:
                break
            if other is not exchange and other.held_bytes > self._small_bytes:
                other.interrupt(_full())
                self.leave(other)
                return
        raise _full()


def _full() -> OverloadedError:
    return OverloadedError(_FULL, code=Code.TOO_MANY_REQUESTS, limit=Limit.BUFFERED_BYTES)
