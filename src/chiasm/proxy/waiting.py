"""Requests that wait: for an instance that is expected back, or for room when all instances are full."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Hashable

from chiasm.errors import Code, OverloadedError
from chiasm.proxy.fleet import Fleet
from chiasm.proxy.instance import Instance
from chiasm.proxy.metrics import Metrics
from chiasm.wire import Role

_RETRY_AFTER_SECONDS = 5
"""For a client whose request needs an instance that isn't there: more than for one that only finds no room."""
_UNAVAILABLE = {
    Role.ENCODER: ("encoder", Code.NO_ENCODER),
    Role.PREFILL: ("prefill instance", Code.NO_PREFILL),
    Role.DECODE: ("decode instance", Code.NO_DECODE),
}
_JOIN_SECONDS = 5.0
"""For so long after a proxy has started, instances that it knew before may still join again: each tries twice a second."""
_TRY_SECONDS = 0.1
"""The first request in line tries again after so long even if no call has ended: others may use the instances too."""


def none_healthy(role: Role, waited_seconds: float = 0.0) -> OverloadedError:
    """Return the error for a request that needs an instance of this role, or one that does the same."""
    name, code = _UNAVAILABLE.get(role, ("PD or aggregated instance", Code.NO_PD))
    what = f"No {name} became healthy within {waited_seconds:g} s" if waited_seconds else f"No {name} is healthy"
    return OverloadedError(f"{what}; try again later.", code=code, retry_after_seconds=_RETRY_AFTER_SECONDS)


class Comeback:
    """Requests that wait for an instance that is starting or was just lost, while no other can take its place.

    A proxy whose instances join doesn't know them yet when it has just started, so it waits a short while for any role.
    """

    def __init__(
        self, fleet: Fleet, metrics: Metrics, *, seconds: float, max_requests: int, instances_join: bool = False
    ) -> None:
        self._fleet = fleet
        self._seconds = seconds
        self._max_requests = max_requests
        self._waiting = 0
        self._changed = asyncio.Event()
        self._joins_until = time.monotonic() + (_JOIN_SECONDS if instances_join else 0.0)
        fleet.listeners.append(self._note_change)
        metrics.waiting.labels("instance").set_function(lambda: self._waiting)

    async def wait(self, lacking: Callable[[], Role | None]) -> None:
        """Return as soon as ``lacking`` names no role any more; it names one that lacks a healthy instance.

        Raises OverloadedError if none of that role is expected, too many requests wait, or it takes too long.
        """
        role = lacking()
        if role is None:
            return
        self._check(role)
        if self._waiting >= self._max_requests:
            raise OverloadedError(
                f"{self._waiting} requests wait for an instance to come back, which is the limit; try again later.",
                code=Code.TOO_MANY_REQUESTS,
                retry_after_seconds=_RETRY_AFTER_SECONDS,
            )
        self._waiting += 1
        try:
            async with asyncio.timeout(self._seconds):
                while role := lacking():
                    self._check(role)
                    await self._until_changed()
        except TimeoutError:
            raise none_healthy(role or Role.PD, self._seconds) from None
        finally:
            self._waiting -= 1

    def expects(self, role: Role) -> bool:
        """Return whether it is worth waiting for an instance of this role."""
        return self._seconds > 0 and self._fleet.expects(role, time.monotonic())

    def _check(self, role: Role) -> None:
        may_join = self._joins_in > 0 and self._seconds > 0 and not self._fleet.has(role)
        if not (may_join or self.expects(role)):
            raise none_healthy(role)

    @property
    def _joins_in(self) -> float:
        """Seconds that are left for instances that join at the start."""
        return self._joins_until - time.monotonic()

    async def _until_changed(self) -> None:
        """Wait until the state of an instance has changed, or the time for those that join at the start is over."""
        changed, left = self._changed, self._joins_in
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), left if left > 0 else None)

    def _note_change(self, instance: Instance) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class WaitingLine:
    """Requests that wait for room: those of one kind are served first come, first served, and kinds take turns.

    What keeps a request out, such as its API key's share of an instance's queue, keeps out all of its kind, but not those of
    others. Each call that ends lets the first one of a kind try again, so many that wait don't keep full instances busy with
    refusals. There may be room without that, as when an instance has joined. So some try every ``_TRY_SECONDS``: one, and twice
    as many each time if nobody comes back.
    """

    def __init__(self) -> None:
        self._waiting: dict[Hashable, deque[asyncio.Future[None]]] = {}
        """By kind; the one that has the next turn comes first."""
        self._timer: asyncio.TimerHandle | None = None
        self._tries = 1
        """How many try when the time has come."""

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def has(self, kind: Hashable) -> bool:
        """Whether a request of this kind waits."""
        return kind in self._waiting

    async def wait(self, kind: Hashable = None, *, first: bool = False) -> None:
        """Wait for a turn; ``first`` for one that has had its turn, or whose answer has begun."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(kind, deque())
        if first:
            waiting.appendleft(turn)
            self._tries = 1
        else:
            waiting.append(turn)
        self._set_timer()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.advance()  # somebody else's turn now
            raise
        finally:
            if turn in waiting:
                waiting.remove(turn)
                if not waiting:
                    del self._waiting[kind]

    def advance(self) -> None:
        """Give the next one its turn, because a call has ended."""
        while self._waiting:
            kind = next(iter(self._waiting))
            waiting = self._waiting.pop(kind)
            turn = waiting.popleft()
            if waiting:
                self._waiting[kind] = waiting  # behind the other kinds
            if not turn.done():
                turn.set_result(None)
                break

    def _try(self) -> None:
        self._timer = None
        for _ in range(self._tries):
            self.advance()
        self._tries *= 2
        self._set_timer()

    def _set_timer(self) -> None:
        """Have the next try come, unless it is about to: neither who comes nor who goes puts it off."""
        if not self._waiting:
            self._tries = 1
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_TRY_SECONDS, self._try)
