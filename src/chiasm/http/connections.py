"""All connections of a server: how many there may be, which one makes way for a new one, and who has been silent for too long.

A connection is *waiting* from its beginning, or from the first byte of a later request, until the head of the request is
complete; then it is *busy* until the answer has been sent, and then *idle*. Who is busy is never closed here.
"""

from __future__ import annotations

import ipaddress
import time
from collections import Counter
from collections.abc import Hashable
from typing import Protocol

from chiasm.http.config import HttpConfig
from chiasm.http.limits import Limit, Refusals

CONNECTION = "chiasm.connection"
"""Key of a request's scope: the connection over which it came."""
_IPV6_NETWORK_BITS = 64
"""One subscriber has at least a network of this size."""
_MAX_LINGERING = 256
"""Connections that are kept open although they were refused, so that their clients can read why."""


class Watched(Protocol):
    """One connection: :class:`chiasm.http.connection.Connection`."""

    @property
    def peer(self) -> Hashable:
        """Who is at the other end, as :func:`peer_of` names them; None if nobody can tell."""

    @property
    def is_sending(self) -> bool:
        """Whether something of an answer has not gone out yet, because the client reads it slowly."""

    def close(self) -> None:
        """Close it, because another one needs its place."""

    def refuse(self, limit: Limit) -> None:
        """Answer that the limit was reached, and close it."""


class Connections:
    """The connections of one server, on its event loop."""

    def __init__(self, config: HttpConfig, refusals: Refusals) -> None:
        self.config = config
        self.refusals = refusals
        self._max_open = config.max_connections
        self._max_per_peer = config.max_connections_per_peer
        self._peers: Counter[Hashable] = Counter()
        self._open: set[Watched] = set()
        self._waiting: dict[Watched, float] = {}
        """With the time since when; the oldest come first, here and below."""
        self._idle: dict[Watched, None] = {}
        self._lingering: set[Watched] = set()

    @property
    def open(self) -> int:
        """How many there are."""
        return len(self._open)

    @property
    def are_sending(self) -> bool:
        """Whether something of an answer has not gone out yet."""
        return any(connection.is_sending for connection in self._open)

    def reduce_to(self, room: int) -> None:
        """Allow at most so many; to one peer at most half of them, or as large a part as before if that is more."""
        if room < self._max_open:
            part = max(room // 2, self._max_per_peer * room // self._max_open)
            self._max_per_peer = max(1, min(self._max_per_peer, part))
            self._max_open = room

    def admit(self, connection: Watched) -> Limit | None:
        """Take a new connection, or return the limit that forbids it. Somebody who is idle or waits makes way for it."""
        peer = connection.peer
        if peer is not None and self._peers[peer] >= self._max_per_peer:
            if not self._make_way(peer):
                return Limit.CONNECTIONS_PER_PEER
        elif len(self._open) >= self._max_open and not self._make_way(None):
            return Limit.CONNECTIONS
        self._open.add(connection)
        self._peers[peer] += 1
        self._waiting[connection] = time.monotonic()
        return None

    def may_linger(self, connection: Watched) -> bool:
        """Return whether a connection may be read on after its answer; those that were refused are few."""
        if connection not in self._open:
            if len(self._lingering) >= _MAX_LINGERING:
                return False
            self._lingering.add(connection)
        return True

    def leave(self, connection: Watched) -> None:
        """Forget a connection; does nothing if it is not known."""
        self._lingering.discard(connection)
        if connection in self._open:
            self._open.discard(connection)
            self._peers[connection.peer] -= 1
            if not self._peers[connection.peer]:
                del self._peers[connection.peer]
            self.note_busy(connection)

    def note_waiting(self, connection: Watched) -> None:
        """Note that a request has begun to arrive, unless that is known."""
        if connection not in self._waiting and connection in self._open:
            self._idle.pop(connection, None)
            self._waiting[connection] = time.monotonic()

    def note_busy(self, connection: Watched) -> None:
        """Note that the head of a request is complete."""
        self._idle.pop(connection, None)
        self._waiting.pop(connection, None)

    def note_idle(self, connection: Watched) -> None:
        """Note that all requests have been answered."""
        if connection in self._open:
            self._idle[connection] = None

    def end_late_ones(self) -> None:
        """Refuse those whose head has not arrived in time; call it about once a second."""
        before = time.monotonic() - self.config.header_timeout_seconds
        late = []
        for connection, since in self._waiting.items():
            if since > before:
                break
            late.append(connection)
        for connection in late:
            self.note_busy(connection)
            connection.refuse(Limit.HEADER_TIMEOUT)

    def _make_way(self, peer: Hashable) -> bool:
        """Close the oldest idle connection, or else the oldest waiting one, of ``peer`` or, if that is None, of anybody."""
        for group in (self._idle, self._waiting):
            for connection in group:
                if peer is None or connection.peer == peer:
                    self.leave(connection)
                    connection.close()
                    return True
        return False


def peer_of(address: str | None) -> str | None:
    """Return the name of the peer with an address: itself, or for IPv6 its network of 64 bits."""
    if address is None or ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((parsed, _IPV6_NETWORK_BITS), strict=False))
