"""The entries that requests want from a store: made ready in a thread of their own, and kept until a step takes them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from chiasm.ec_transfer.lookout import Lookout

_logger = logging.getLogger(__name__)
_Found = TypeVar("_Found")
_Ready = TypeVar("_Ready")


@dataclass
class _Wanted:
    rank: tuple[int, int]
    """Who comes first if memory is short: who was asked for in the latest round, in the order of asking."""
    requests: set[str] = field(default_factory=set)


@dataclass
class _Here(Generic[_Ready]):
    ready: _Ready
    num_bytes: int
    promised_in: int = -1
    """The last round in which the scheduler was told that it is here."""


class Arrivals(Generic[_Found, _Ready]):
    """Brings what is wanted into memory, at most ``max_bytes`` and ``max_count`` entries, and calls ``wake`` for each.

    If memory is short, the entry of lower rank makes way; it is brought again when there is room. So what the scheduler needs
    first always arrives, whatever else is wanted. One entry is kept whatever its size. All methods belong to the thread that
    schedules.
    """

    def __init__(
        self,
        find: Callable[[str], tuple[_Found, int] | None],
        bring: Callable[[str, _Found], _Ready | None],
        wake: Callable[[], None],
        *,
        max_bytes: int,
        max_count: int,
    ) -> None:
        """All three are called in the thread.

        ``find`` takes microseconds, and returns an entry, unread, with its size in bytes; None if it isn't there. ``bring``
        returns it in memory, verified and ready for use; None if it turns out to be unusable.
        """
        self._find = find
        self._ready_of = bring
        self._wake = wake
        self._max_bytes = max_bytes
        self._max_count = max_count
        self._lock = threading.Lock()
        self._wanted: dict[str, _Wanted] = {}
        self._here: dict[str, _Here[_Ready]] = {}
        self._round = 1
        self._num_asked = 0
        self._lookout = Lookout(self._look, name="chiasm-arrivals")

    def stop(self) -> None:
        """End the thread and let go of everything. Idempotent."""
        self._lookout.stop()
        self._wanted.clear()
        self._here.clear()

    def want(self, request_id: str, identifier: str, *, at_once: bool) -> None:
        """Bring an entry for a request: ``at_once``, or when the scheduler asks for it."""
        with self._lock:
            wanted = self._wanted.get(identifier)
            if wanted is None:
                self._num_asked += 1
                wanted = self._wanted[identifier] = _Wanted((0, self._num_asked))
            wanted.requests.add(request_id)
            if at_once and identifier not in self._here:
                self._lookout.add(identifier)

    def is_wanted(self, identifier: str) -> bool:
        """Whether a request wants the entry."""
        return identifier in self._wanted

    def ask(self, identifier: str) -> bool:
        """Return whether a wanted entry is here; it then stays until ``end_round``. What is asked for first is needed first."""
        with self._lock:
            self._num_asked += 1
            self._wanted[identifier].rank = (-self._round, self._num_asked)
            here = self._here.get(identifier)
            if here is None:
                self._lookout.add(identifier)  # it may have been taken, and be wanted again
                return False
            here.promised_in = self._round
            return True

    def holds(self, identifier: str) -> bool:
        """Whether the entry is here now. May be called from any thread."""
        return identifier in self._here

    def peek(self, identifier: str) -> _Ready | None:
        """Return an entry that is here."""
        here = self._here.get(identifier)
        return None if here is None else here.ready

    def take(self, identifier: str) -> _Ready | None:
        """Return an entry that is here, and keep it no longer."""
        with self._lock:
            here = self._here.pop(identifier, None)
        return None if here is None else here.ready

    def end_round(self) -> None:
        """End the order in which the scheduler has asked, and the promises that it got."""
        self._round += 1

    def let_go(self, request_id: str, identifiers: Iterable[str]) -> None:
        """Keep and look for nothing that only this request wanted."""
        with self._lock:
            for identifier in identifiers:
                wanted = self._wanted.get(identifier)
                if wanted is None:
                    continue
                wanted.requests.discard(request_id)
                if not wanted.requests:
                    del self._wanted[identifier]
                    self._here.pop(identifier, None)
                    self._lookout.remove(identifier)

    # ---- the thread -----------------------------------------------------------------------------------------------------

    def _look(self, identifiers: Sequence[str]) -> bool:
        with self._lock:
            ranks = {name: self._wanted[name].rank for name in identifiers if name in self._wanted}
        arrived = False
        for identifier in sorted(ranks, key=ranks.__getitem__):
            try:
                arrived = self._bring(identifier) or arrived
            except Exception:  # it costs the requests that want this entry, and nobody else
                _logger.exception("The embedding of item %s cannot be loaded.", identifier)
                self._lookout.remove(identifier)
        return arrived

    def _bring(self, identifier: str) -> bool:
        found = self._find(identifier)
        if found is None or not self._make_room(identifier, found[1]):
            return False
        ready = self._ready_of(identifier, found[0])
        if ready is None:
            return False
        with self._lock:
            self._lookout.remove(identifier)
            if identifier not in self._wanted:
                return True
            self._here[identifier] = _Here(ready, found[1])
        self._wake()
        return True

    def _make_room(self, identifier: str, num_bytes: int) -> bool:
        """Drop entries of lower rank for this one, if that makes enough room; return whether there is room."""
        with self._lock:
            wanted = self._wanted.get(identifier)
            if wanted is None:
                return False
            kept = sorted(self._here, key=lambda name: self._wanted[name].rank)
            kept_bytes = sum(here.num_bytes for here in self._here.values())
            dropped: list[str] = []
            while kept and (len(kept) >= self._max_count or kept_bytes + num_bytes > self._max_bytes):
                last = kept.pop()
                here = self._here[last]
                if self._wanted[last].rank < wanted.rank or here.promised_in == self._round:
                    return False
                kept_bytes -= here.num_bytes
                dropped.append(last)
            for name in dropped:
                del self._here[name]
                self._lookout.add(name)
            return True
