"""The table of what a producer holds, for whom and until when. It has no sockets and no clock: the time is an argument.

A lease begins when a prompt is computed. If nobody claims it, it ends when it is given back, or after ``lease_seconds``. If it
is claimed, it ends when its holder gives it back or goes away, or when the deadline of the holder's request passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class LeaseRefused(Exception):
    """A claim was refused or lost; ``str(error)`` is a clause for the client that says why."""


@dataclass
class _Lease:
    block_ids: list[int]
    expires: float
    holder: int | None = None


class LeaseTable:
    """The leases of one producer, by request. ``holder`` is a number that stands for a consumer's connection.

    Times are seconds of a monotonic clock.
    """

    def __init__(self, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self._leases: dict[str, _Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def next_expiry(self) -> float | None:
        """When the next lease expires if nothing happens; None without leases."""
        return min((lease.expires for lease in self._leases.values()), default=None)

    def hold(self, request_id: str, block_ids: Sequence[int], now: float) -> None:
        """Begin a lease. Raises ValueError if the request has one already."""
        if request_id in self._leases:
            raise ValueError(f"the blocks of request {request_id!r} are held already")
        self._leases[request_id] = _Lease(list(block_ids), now + self._lease_seconds)

    def claim(self, request_id: str, block_ids: Sequence[int], holder: int, seconds: float, now: float) -> None:
        """Give the lease to ``holder`` for ``seconds``. Raises LeaseRefused, and then changes nothing."""
        lease = self._leases.get(request_id)
        if lease is None or lease.expires <= now:
            raise LeaseRefused("its lease has ended, its KV was fetched already, or it never had KV here")
        if lease.holder is not None:
            raise LeaseRefused("its KV is claimed already, and a handle serves one request")
        if lease.block_ids != list(block_ids):
            raise LeaseRefused("the block ids of the handle are not those of its request")
        lease.holder = holder
        lease.expires = now + seconds

    def is_claimed(self, request_id: str, holder: int, now: float) -> bool:
        """Return whether ``holder`` still has the lease that it claimed, so that the blocks are unchanged."""
        lease = self._leases.get(request_id)
        return lease is not None and lease.holder == holder and lease.expires > now

    def release(self, request_id: str, holder: int) -> bool:
        """End the lease if ``holder`` has it; return whether it did."""
        lease = self._leases.get(request_id)
        if lease is None or lease.holder != holder:
            return False
        del self._leases[request_id]
        return True

    def give_back(self, request_id: str) -> bool:
        """End the lease if nobody has claimed it; return whether that was so."""
        lease = self._leases.get(request_id)
        if lease is None or lease.holder is not None:
            return False
        del self._leases[request_id]
        return True

    def release_all(self, holder: int) -> list[str]:
        """End all leases of ``holder``, and return their requests."""
        return self._end([request_id for request_id, lease in self._leases.items() if lease.holder == holder])

    def expire(self, now: float) -> list[str]:
        """End the leases whose time is over, and return their requests."""
        return self._end([request_id for request_id, lease in self._leases.items() if lease.expires <= now])

    def _end(self, request_ids: list[str]) -> list[str]:
        for request_id in request_ids:
            del self._leases[request_id]
        return request_ids
