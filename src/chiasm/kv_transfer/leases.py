"""What a producer holds, for whom and until when. Nothing here knows a socket or a clock: the time is an argument.

A lease begins when a prompt is computed. Unclaimed, it ends when its seconds are over; claimed, when its holder gives it
back or goes away, or when the deadline of the holder's request passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class LeaseRefused(Exception):
    """A claim that can't be granted; ``str(error)`` says why, fit to be shown to a client."""


@dataclass
class _Lease:
    block_ids: list[int]
    expires: float
    holder: int | None = None


class LeaseTable:
    """The leases of one producer, by request. ``holder`` is a number that stands for a consumer's connection.

    Times are seconds of one clock that never goes back.
    """

    def __init__(self, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self._leases: dict[str, _Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def next_expiry(self) -> float | None:
        """When the next lease runs out if nothing happens; None without leases."""
        return min((lease.expires for lease in self._leases.values()), default=None)

    def hold(self, request_id: str, block_ids: Sequence[int], now: float) -> None:
        """Begin a lease. Raises ValueError when the request has one: its id names no single request."""
        if request_id in self._leases:
            raise ValueError(f"the blocks of request {request_id!r} are held already")
        self._leases[request_id] = _Lease(list(block_ids), now + self._lease_seconds)

    def claim(self, request_id: str, block_ids: Sequence[int], holder: int, seconds: float, now: float) -> None:
        """The lease is ``holder``'s for ``seconds``. Raises LeaseRefused, and then nothing has changed."""
        lease = self._leases.get(request_id)
        if lease is None or lease.expires <= now:
            raise LeaseRefused("its lease ran out, it was fetched already, or it was never here")
        if lease.holder is not None:
            raise LeaseRefused("it is claimed already; a handle serves one request")
        if lease.block_ids != list(block_ids):
            raise LeaseRefused("the block ids of the handle are not those of its request")
        lease.holder = holder
        lease.expires = now + seconds

    def is_claimed(self, request_id: str, holder: int, now: float) -> bool:
        """Whether ``holder`` has had the lease without a break until now, so that its blocks are untouched."""
        lease = self._leases.get(request_id)
        return lease is not None and lease.holder == holder and lease.expires > now

    def release(self, request_id: str, holder: int) -> bool:
        """End the lease if ``holder`` has claimed it; whether it had."""
        lease = self._leases.get(request_id)
        if lease is None or lease.holder != holder:
            return False
        del self._leases[request_id]
        return True

    def release_all(self, holder: int) -> list[str]:
        """End all leases of ``holder``, who is gone; their requests."""
        return self._end([request_id for request_id, lease in self._leases.items() if lease.holder == holder])

    def expire(self, now: float) -> list[str]:
        """End the leases whose time is over; their requests."""
        return self._end([request_id for request_id, lease in self._leases.items() if lease.expires <= now])

    def _end(self, request_ids: list[str]) -> list[str]:
        for request_id in request_ids:
            del self._leases[request_id]
        return request_ids
