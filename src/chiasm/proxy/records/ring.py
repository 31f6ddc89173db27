"""The records that are kept: the last ones, and the slowest."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from itertools import count

from chiasm.http import Exchange
from chiasm.proxy.records.record import Record, record_of
from chiasm.proxy.records.trace_context import read_trace_context
from chiasm.proxy.records.trail import Trail

KEPT = 1000
SLOWEST_KEPT = 100


class Records:
    """The records of one proxy; on its event loop."""

    def __init__(self, kept: int = KEPT, slowest_kept: int = SLOWEST_KEPT) -> None:
        self._open: dict[Exchange, Trail] = {}
        self._last: deque[Record] = deque(maxlen=kept)
        self._slowest: list[tuple[float, int, Record]] = []
        """A heap with the fastest of them first."""
        self._slowest_kept = slowest_kept
        self._numbers = count()

    @property
    def open(self) -> int:
        """How many requests have begun and not ended."""
        return len(self._open)

    def begin(self, exchange: Exchange) -> Trail:
        """Note that a request has come."""
        trail = self._open[exchange] = Trail(exchange.visit.arrival, read_trace_context(exchange.headers))
        return trail

    def trail_of(self, exchange: Exchange) -> Trail:
        """Return the trail of a request that has begun."""
        return self._open[exchange]

    def end(self, exchange: Exchange, path: str) -> Record:
        """Keep the record of a request that has ended, and return it."""
        record = record_of(exchange, path, self._open.pop(exchange))
        self.keep(record)
        return record

    def keep(self, record: Record) -> None:
        """Keep a record, and forget the oldest one or the fastest of the slowest."""
        self._last.append(record)
        entry = (record.seconds, next(self._numbers), record)
        if len(self._slowest) < self._slowest_kept:
            heapq.heappush(self._slowest, entry)
        elif entry > self._slowest[0]:
            heapq.heapreplace(self._slowest, entry)

    def last(self) -> Iterator[Record]:
        """Yield the last ones, the newest first."""
        return reversed(self._last)

    def slowest(self) -> Iterator[Record]:
        """Yield the slowest ones, the slowest first."""
        return (record for _, _, record in sorted(self._slowest, reverse=True))

    def named(self, request_id: str) -> Iterator[Record]:
        """Yield those of this id, the newest first. A client may give several requests one id."""
        found = {id(one): one for one in (*self._last, *self.slowest()) if one.id == request_id}
        return iter(sorted(found.values(), key=lambda one: one.ended_at, reverse=True))
