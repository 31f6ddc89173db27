"""Bounds on all requests of a server together: how many are being answered, and how many bytes they hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from chiasm.errors import Code, OverloadedError


class Admitted(Protocol):
    """A request that is being answered: :class:`chiasm.http.Exchange`."""

    def release(self) -> None:
        """Give back all bytes that it still holds."""

    def interrupt(self, reason: Exception) -> None:
        """End the work on it with an error."""


class Admission:
    """The requests that are being answered; one beyond the bounds is refused with ``Retry-After``."""

    def __init__(self, max_requests: int, max_held_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_held_bytes = max_held_bytes
        self._held_bytes = 0
        self._exchanges: set[Admitted] = set()

    @property
    def requests(self) -> int:
        """How many requests are being answered."""
        return len(self._exchanges)

    @property
    def held_bytes(self) -> int:
        """How many bytes of bodies and media they hold."""
        return self._held_bytes

    @contextmanager
    def admitted(self, exchange: Admitted) -> Iterator[None]:
        """Count the exchange as being answered until ``leave``, or until the block ends. Raises OverloadedError."""
        if len(self._exchanges) >= self._max_requests:
            raise OverloadedError(
                f"{len(self._exchanges)} requests are being answered, which is the limit; try again later.",
                code=Code.TOO_MANY_REQUESTS,
            )
        self._exchanges.add(exchange)
        try:
            yield
        finally:
            self.leave(exchange)

    def leave(self, exchange: Admitted) -> None:
        """Free the place and the bytes that the exchange holds; does nothing the second time."""
        self._exchanges.discard(exchange)
        exchange.release()

    def hold(self, size_bytes: int) -> None:
        """Raises OverloadedError if all requests together would hold too much."""
        if self._held_bytes + size_bytes > self._max_held_bytes:
            raise OverloadedError(
                "The requests being answered hold as much data as the limit allows; try again later.",
                code=Code.TOO_MANY_REQUESTS,
            )
        self._held_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        """Give back bytes that were held."""
        self._held_bytes -= size_bytes

    def interrupt_all(self, reason: Exception) -> None:
        """End all requests with an error."""
        for exchange in list(self._exchanges):
            exchange.interrupt(reason)
