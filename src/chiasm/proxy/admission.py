"""How much the proxy takes on at one time."""

from __future__ import annotations

from types import TracebackType

from chiasm.errors import OverloadedError


class Admission:
    """Bounds on requests and on buffered bytes, all requests together; beyond them a request is told to come again."""

    def __init__(self, max_requests: int, max_buffered_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_buffered_bytes = max_buffered_bytes
        self.requests = 0
        self.buffered_bytes = 0

    def enter(self) -> Ticket:
        """Raises OverloadedError if as many requests as may be are being answered."""
        if self.requests >= self._max_requests:
            raise OverloadedError("too many requests are being answered; try again", code="too_many_requests")
        return Ticket(self)

    def reserve(self, size_bytes: int) -> None:
        if self.buffered_bytes + size_bytes > self._max_buffered_bytes:
            raise OverloadedError("too much data of requests is being held; try again", code="too_many_requests")
        self.buffered_bytes += size_bytes


class Ticket:
    """One request's place, and the bytes that it holds; both are given back at its end."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._held_bytes = 0

    def hold(self, size_bytes: int) -> None:
        """Raises OverloadedError if all requests together would hold too much."""
        self._admission.reserve(size_bytes)
        self._held_bytes += size_bytes

    def give_back_bytes(self, *, but: int = 0) -> None:
        """The bytes are held no more, ``but`` so many at most."""
        kept = min(self._held_bytes, but)
        self._admission.buffered_bytes -= self._held_bytes - kept
        self._held_bytes = kept

    def __enter__(self) -> Ticket:
        self._admission.requests += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._admission.requests -= 1
        self.give_back_bytes()
