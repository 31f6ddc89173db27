"""What requests want, and what of it is in bounded memory. It has no threads, no clock and no memory of its own.

All that is wanted has one order: first what the engine asked for in its latest round, in the order of asking, then what the
oldest request wants. An entry gets room if there is some, or if entries that come after it and are ready can give theirs up.
So the first one always comes, none that waits keeps room from one that comes before it, and memory is bounded. What the engine
was told to be ready stays until its round ends.

Where an entry is found, and how it comes, is the owner's: a folder's (``arrivals``), a store's (``stores.reader``), or that of
other processes (``wants``).
"""

from __future__ import annotations

import enum
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

EntryT = TypeVar("EntryT")


class Stage(enum.Enum):
    """How far an entry has come."""

    IDLE = enum.auto()
    """The engine has it, or doesn't need it as long as it has what was computed from it."""
    WAITING = enum.auto()
    """It is needed."""
    COMING = enum.auto()
    """It has room and is being brought, which ends with ``arrive`` or ``fail``."""
    READY = enum.auto()


@dataclass(eq=False)
class Wanted(Generic[EntryT]):
    """An entry that requests want. Owners derive from it what else they know of one."""

    identifier: str
    rank: tuple[int, int] = (0, 0)
    """Its place in the order."""
    max_rows: int = 0
    """A request can't use an entry with more rows."""
    requests: set[str] = field(default_factory=set)
    stage: Stage = Stage.IDLE
    held_bytes: int = 0
    """Its room."""
    entry: EntryT | None = None
    """Set while it is ready."""
    promised_in: int = 0
    """The latest round in which the engine was told that it is ready."""


WantedT = TypeVar("WantedT", bound=Wanted[Any])


class Intake(Generic[WantedT, EntryT]):
    """The entries that are wanted, of which at most ``max_count`` with ``max_bytes`` have room. One has it whatever its size.

    Not thread-safe.
    """

    def __init__(
        self,
        make: Callable[[str], WantedT],
        look_for: Callable[[WantedT], None],
        *,
        max_bytes: int,
        max_count: int = sys.maxsize,
    ) -> None:
        """``make`` makes an entry, given its identifier. ``look_for`` is called whenever one begins to wait."""
        self._make = make
        self._look_for = look_for
        self._max_bytes = max_bytes
        self._max_count = max_count
        self._wanted: dict[str, WantedT] = {}
        self._num_held = 0
        """How many entries have room."""
        self._held_bytes = 0
        self._round = 1
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._wanted)

    def __iter__(self) -> Iterator[WantedT]:
        """All that is wanted, in no order."""
        return iter(self._wanted.values())

    def get(self, identifier: str) -> WantedT | None:
        """Return what is known of an entry that is wanted."""
        return self._wanted.get(identifier)

    @property
    def held_bytes(self) -> int:
        """Room of all entries together."""
        return self._held_bytes

    # ---- requests and the engine --------------------------------------------------------------------------------------

    def want(self, request_id: str, identifier: str, max_rows: int, *, is_needed: bool) -> WantedT:
        """A request wants an entry until ``finish``; if it isn't needed yet, it waits from when the engine asks for it."""
        wanted = self._wanted.get(identifier)
        if wanted is None:
            wanted = self._wanted[identifier] = self._make(identifier)
            wanted.rank = (0, next(self._numbers))
            if is_needed:
                self.wait(wanted)
        wanted.max_rows = max(wanted.max_rows, max_rows)
        wanted.requests.add(request_id)
        return wanted

    def finish(self, request_id: str, identifiers: Iterable[str]) -> list[WantedT]:
        """The request wants none of these any more. Return those that are dropped: nobody wants them, and they don't come."""
        dropped: list[WantedT] = []
        for identifier in identifiers:
            wanted = self._wanted.get(identifier)
            if wanted is None:
                continue
            wanted.requests.discard(request_id)
            if not wanted.requests and wanted.stage is not Stage.COMING:
                self._drop(wanted)
                dropped.append(wanted)
        return dropped

    def ask(self, identifier: str) -> bool:
        """The engine needs an entry, after those it has asked for in this round. Return whether it is ready.

        If so, it stays until the round ends. That counts for its place too: if what is ready gave way to what is needed later,
        the two would take each other's room for ever.
        """
        wanted = self._wanted.get(identifier)
        if wanted is None:
            return False
        if wanted.rank[0] != -self._round:
            wanted.rank = (-self._round, next(self._numbers))
        if wanted.stage is Stage.READY:
            wanted.promised_in = self._round
            return True
        if wanted.stage is Stage.IDLE:
            self.wait(wanted)
        return False

    def end_round(self) -> None:
        """End the order in which the engine has asked, and the promises that it got."""
        self._round += 1

    def ready(self, identifier: str) -> EntryT | None:
        """Return an entry if it is ready."""
        wanted = self._wanted.get(identifier)
        entry: EntryT | None = None if wanted is None else wanted.entry
        return entry

    def take(self, identifier: str) -> EntryT | None:
        """Return an entry if it is ready. The engine has it now, so it holds no room here any more."""
        wanted = self._wanted.get(identifier)
        if wanted is None or wanted.stage is not Stage.READY:
            return None
        entry: EntryT | None = wanted.entry
        wanted.stage, wanted.entry = Stage.IDLE, None
        self._hold(wanted, 0)
        return entry

    def clear(self) -> None:
        """Forget everything."""
        self._wanted.clear()
        self._num_held = self._held_bytes = 0

    # ---- what comes ---------------------------------------------------------------------------------------------------

    def in_order(self, stage: Stage) -> list[WantedT]:
        """Return the entries of this stage, in order."""
        return sorted((wanted for wanted in self if wanted.stage is stage), key=lambda wanted: wanted.rank)

    def reserve(self, wanted: WantedT, num_bytes: int) -> bool:
        """Give room to one that waits, if need be from ready ones that come after it. Return whether it has it now."""
        self.release(wanted)
        num_held, held_bytes = self._num_held, self._held_bytes
        dropped: list[WantedT] = []
        ready: list[WantedT] | None = None
        while num_held and (num_held >= self._max_count or held_bytes + num_bytes > self._max_bytes):
            if ready is None:
                ready = self.in_order(Stage.READY)
            if not ready or ready[-1].rank < wanted.rank or ready[-1].promised_in == self._round:
                return False
            dropped.append(ready.pop())
            num_held -= 1
            held_bytes -= dropped[-1].held_bytes
        for other in dropped:
            self.wait(other)
        self._hold(wanted, num_bytes)
        return True

    def release(self, wanted: WantedT) -> None:
        """Take back the room of one that waits."""
        self._hold(wanted, 0)

    def come(self, wanted: WantedT, num_bytes: int) -> None:
        """One that waited is being brought into its room."""
        wanted.stage = Stage.COMING
        self._hold(wanted, num_bytes)

    def arrive(self, wanted: WantedT, entry: EntryT) -> bool:
        """One that came is ready. Return whether a request wants it; otherwise it is dropped."""
        wanted.stage, wanted.entry = Stage.READY, entry
        return self._is_kept(wanted)

    def fail(self, wanted: WantedT) -> bool:
        """One didn't come, and waits again. Return whether a request wants it; otherwise it is dropped."""
        if self._is_kept(wanted):
            self.wait(wanted)
            return True
        return False

    def wait(self, wanted: WantedT) -> None:
        """An entry is needed, and isn't here any more."""
        wanted.stage, wanted.entry = Stage.WAITING, None
        self._hold(wanted, 0)
        self._look_for(wanted)

    def _is_kept(self, wanted: WantedT) -> bool:
        if not wanted.requests:
            self._drop(wanted)
        return bool(wanted.requests)

    def _drop(self, wanted: WantedT) -> None:
        if self._wanted.pop(wanted.identifier, None) is not None:
            self._hold(wanted, 0)

    def _hold(self, wanted: WantedT, num_bytes: int) -> None:
        self._num_held += (num_bytes > 0) - (wanted.held_bytes > 0)
        self._held_bytes += num_bytes - wanted.held_bytes
        wanted.held_bytes = num_bytes
