"""What a reader wants, where it may be, and what is brought in next. It has no sockets, no clock and no memory.

An embedding is brought in when a request wants it, a place has it, and there is room. All that is wanted has one order: first
what the engine needs next, then what the oldest request wants. An embedding gets room only if all that come before it have
theirs, and takes it from those that come later if it must. So the first one always comes, and none waits for one that waits.

What a place is told is collected in ``take_sends``, and what is to be read from one in ``take_reads``.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Generic, NamedTuple, TypeVar

from chiasm.ec_transfer.entry_file import HEADER_BYTES, EntryHeader
from chiasm.ec_transfer.peer_messages import Bad, Done, Forget, Here, Take, Want
from chiasm.wire import ECPlace

EntryT = TypeVar("EntryT")

MAX_PLACES = 1 << 14
"""Embeddings whose places are kept although no request wants them yet."""
MAX_PLACES_OF_ONE = 2
"""Places of one embedding that are kept: an encoder that is slow may be helped by another."""


class Wanted(NamedTuple):
    """An item that a request wants. Its embedding has at most ``max_rows`` rows."""

    identifier: str
    max_rows: int
    is_needed: bool = True
    """If not, the engine has it, or doesn't need it as long as it has what was computed from it."""


class Send(NamedTuple):
    """A message to the holder at a place."""

    place: ECPlace
    message: Want | Take | Done | Forget | Bad


class Read(NamedTuple):
    """The entry may be read from here now. It ends with ``arrived`` or ``failed``."""

    place: ECPlace
    here: Here
    header: EntryHeader

    @property
    def num_bytes(self) -> int:
        """Size of the entry with its header."""
        return HEADER_BYTES + self.header.data_bytes


class _Stage(enum.Enum):
    WAITING = enum.auto()
    """It is wanted, and not granted."""
    ASKED = enum.auto()
    """A grant was asked for."""
    READING = enum.auto()
    READY = enum.auto()
    TAKEN = enum.auto()
    """The engine has it. If it loses it again, it is brought in once more."""


@dataclass(eq=False)
class _Item(Generic[EntryT]):
    identifier: str
    max_rows: int = 0
    requests: set[str] = field(default_factory=set)
    places: dict[ECPlace, Here | None] = field(default_factory=dict)
    """What each place has said. The newest place comes last."""
    stage: _Stage = _Stage.WAITING
    source: ECPlace | None = None
    """Where it is asked for, read from, or came from."""
    entry: EntryT | None = None
    size_bytes: int = 0
    """Its size, once it is known."""

    @property
    def holds_room(self) -> bool:
        return self.stage in (_Stage.ASKED, _Stage.READING, _Stage.READY)


class WantTable(Generic[EntryT]):
    """The embeddings that the requests of one reader want.

    ``capacity_bytes`` bounds what is granted, read or ready, and not taken by the engine; a larger entry is never brought in.
    """

    def __init__(self, capacity_bytes: int, fingerprint: str, *, row_bytes: int = 0) -> None:
        """``row_bytes`` is the size of one row of an embedding; 0 if it isn't known before one was seen."""
        self.capacity_bytes = capacity_bytes
        self._fingerprint = fingerprint
        self._items: dict[str, _Item[EntryT]] = {}
        self._requests: dict[str, list[str]] = {}
        """The identifiers that a request wants, in the order of need. The oldest request comes first."""
        self._needed: tuple[str, ...] = ()
        self._expected: OrderedDict[str, dict[ECPlace, Here | None]] = OrderedDict()
        """Where embeddings are that no request wants yet."""
        self._row_bytes = row_bytes
        self._unsent: list[tuple[_Item[EntryT], ECPlace]] = []
        """What wasn't asked for yet."""
        self._sends: list[Send] = []
        self._reads: list[Read] = []

    def __len__(self) -> int:
        return len(self._items)

    # ---- what is to be done -------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether there is something to be sent or read."""
        return bool(self._sends or self._reads)

    def take_sends(self) -> list[Send]:
        """Return what is to be told to holders, in this order. Only Want is worth a new connection."""
        sends, self._sends = self._sends, []
        return sends

    def take_reads(self) -> list[Read]:
        """Return what is to be read. Each ends with ``arrived`` or ``failed``."""
        reads, self._reads = self._reads, []
        return reads

    @property
    def held_bytes(self) -> int:
        """Size of what is granted, read or ready."""
        return sum(item.size_bytes for item in self._items.values() if item.holds_room)

    def places_in_use(self) -> set[ECPlace]:
        """Return the places from which something may come."""
        return {
            place
            for item in self._items.values()
            if item.stage not in (_Stage.READY, _Stage.TAKEN)
            for place in (*item.places, item.source)
            if place is not None
        }

    # ---- the engine ---------------------------------------------------------------------------------------------------

    def want(self, request_id: str, wanted: Sequence[Wanted]) -> None:
        """A request wants these items, in this order, until ``finish``."""
        names = self._requests.setdefault(request_id, [])
        for identifier, max_rows, is_needed in wanted:
            item = self._items.get(identifier)
            if item is None:
                item = self._items[identifier] = _Item(identifier)
                item.places = self._expected.pop(identifier, {})
                item.stage = _Stage.WAITING if is_needed else _Stage.TAKEN
                self._ask(item)
            item.max_rows = max(item.max_rows, max_rows)
            item.requests.add(request_id)
            if identifier not in names:
                names.append(identifier)
        self._plan()

    def finish(self, request_id: str) -> None:
        """A request wants nothing any more."""
        for identifier in self._requests.pop(request_id, []):
            item = self._items[identifier]
            item.requests.discard(request_id)
            if not item.requests and item.stage is not _Stage.READING:
                self._drop(item)
        self._plan()

    def need_next(self, identifiers: Sequence[str]) -> None:
        """The engine needs these next, in this order."""
        if tuple(identifiers) != self._needed:
            self._needed = tuple(identifiers)
            self._plan()

    def is_coming(self, identifier: str) -> bool:
        """Return whether a holder has the entry or it is ready."""
        item = self._items.get(identifier)
        if item is None:
            return False
        return item.stage is not _Stage.WAITING or any(here is not None for here in item.places.values())

    def ready(self, identifier: str) -> EntryT | None:
        """Return the entry if it is ready."""
        item = self._items.get(identifier)
        return item.entry if item is not None and item.stage is _Stage.READY else None

    def is_taken(self, identifier: str) -> bool:
        """Return whether the engine took the entry."""
        item = self._items.get(identifier)
        return item is not None and item.stage is _Stage.TAKEN

    def take(self, identifier: str) -> None:
        """The engine has the entry now, so it holds no room here any more."""
        item = self._items.get(identifier)
        if item is not None and item.stage is _Stage.READY:
            item.stage, item.entry = _Stage.TAKEN, None
            self._plan()

    def again(self, identifier: str, entry: EntryT | None = None) -> None:
        """The engine has given up what it took, and wants it again. ``entry`` is it if it is in memory nevertheless."""
        item = self._items.get(identifier)
        if item is None or item.stage is not _Stage.TAKEN:
            return
        if entry is not None:
            item.stage, item.entry = _Stage.READY, entry
        else:
            self._wait(item)
            self._ask(item)
            self._plan()

    def reject(self, identifier: str) -> None:
        """What came is of no use: where it came from shall not offer it any more."""
        item = self._items.get(identifier)
        if item is None or item.stage not in (_Stage.READY, _Stage.TAKEN):
            return
        if item.source is not None:
            self._sends.append(Send(item.source, Bad(identifier)))
            item.places.pop(item.source, None)
        self._wait(item)
        self._ask(item)
        self._plan()

    # ---- places -------------------------------------------------------------------------------------------------------

    def expect(self, places: Mapping[str, ECPlace]) -> None:
        """These embeddings are or will be there."""
        for identifier, place in places.items():
            item = self._items.get(identifier)
            if item is None:
                self._keep(identifier, place)
                continue
            here = item.places.pop(place, None)
            item.places[place] = here
            others = [other for other in item.places if other not in (place, item.source)]
            if len(item.places) > MAX_PLACES_OF_ONE and others:
                del item.places[others[0]]
                self._sends.append(Send(others[0], Forget(identifier)))
            if here is None and item.stage in (_Stage.WAITING, _Stage.ASKED) and place != item.source:
                self._unsent.append((item, place))
        self._plan()

    def lose(self, place: ECPlace) -> list[str]:
        """Nothing comes from there any more. Return what was to come from there.

        What is being read ends by itself, since some data planes don't need the holder for that.
        """
        lost: list[str] = []
        for item in self._items.values():
            known = place in item.places
            item.places.pop(place, None)
            if item.stage is _Stage.ASKED and item.source == place:
                self._wait(item)
            if known and item.stage is _Stage.WAITING:
                lost.append(item.identifier)
        self._sends = [send for send in self._sends if send.place != place]
        for identifier in [name for name, places in self._expected.items() if place in places]:
            del self._expected[identifier][place]
            if not self._expected[identifier]:
                del self._expected[identifier]
        self._plan()
        return lost

    def _keep(self, identifier: str, place: ECPlace) -> None:
        places = self._expected.setdefault(identifier, {})
        places.pop(place, None)
        places[place] = None
        if len(places) > MAX_PLACES_OF_ONE:
            del places[next(iter(places))]
        self._expected.move_to_end(identifier)
        if len(self._expected) > MAX_PLACES:
            self._expected.popitem(last=False)

    # ---- what holders say, and what was read --------------------------------------------------------------------------

    def here(self, place: ECPlace, here: Here) -> str | None:
        """A holder has an entry. Return why it can't be used, as a clause; None if it can."""
        item = self._items.get(here.identifier)
        if item is None or place not in item.places:  # it isn't wanted from there any more
            self._sends.append(Send(place, Forget(here.identifier)))
            return None
        header = EntryHeader(here.identifier, self._fingerprint, here.dtype, tuple(here.shape), here.checksum)
        reason = self._misfit(header)
        if reason is not None:
            self._sends.append(Send(place, Forget(here.identifier)))
            self._withdraw(item, place)
            self._plan()
            return reason
        if header.shape and header.shape[0]:
            self._row_bytes = max(self._row_bytes, header.data_bytes // header.shape[0])
        is_open = item.stage is _Stage.WAITING or (item.stage is _Stage.ASKED and item.source == place)
        if not here.granted:
            item.places[place] = here
            if is_open:
                item.size_bytes = header.data_bytes
        elif is_open:
            item.places[place] = here
            item.size_bytes = header.data_bytes
            item.stage, item.source = _Stage.READING, place
            self._reads.append(Read(place, here, header))
        elif item.source != place:  # it comes from elsewhere already
            self._sends.append(Send(place, Forget(here.identifier)))
            del item.places[place]
        self._plan()
        return None

    def gone(self, place: ECPlace, identifier: str) -> bool:
        """A holder has an entry no more. Return whether it has to come from elsewhere now."""
        item = self._items.get(identifier)
        if item is None or place not in item.places or item.stage in (_Stage.READY, _Stage.TAKEN):
            return False
        if item.stage is _Stage.READING and item.source == place:
            return False
        self._withdraw(item, place)
        self._plan()
        return item.stage is _Stage.WAITING

    def arrived(self, read: Read, entry: EntryT) -> bool:
        """What was read is whole. Return whether a request wants it; otherwise it is dropped."""
        item = self._items[read.header.identifier]
        self._sends.append(Send(read.place, Done(item.identifier)))
        self._sends += [Send(place, Forget(item.identifier)) for place in item.places if place != read.place]
        item.places = {read.place: None} if read.place in item.places else {}
        item.stage, item.entry = _Stage.READY, entry
        if not item.requests:
            self._drop(item)
        self._plan()
        return bool(item.requests)

    def failed(self, read: Read, *, bad: bool) -> bool:
        """What was read is not whole. ``bad``: the holder shall not offer it any more. Return whether a request wants it."""
        item = self._items[read.header.identifier]
        self._sends.append(Send(read.place, Bad(item.identifier) if bad else Done(item.identifier)))
        self._withdraw(item, read.place)
        self._wait(item)
        self._ask(item)
        if not item.requests:
            self._drop(item)
        self._plan()
        return bool(item.requests)

    def is_wanted(self, read: Read) -> bool:
        """Return whether a request wants what is being read."""
        return bool(self._items[read.header.identifier].requests)

    def _misfit(self, header: EntryHeader) -> str | None:
        if not header.has_known_dtype:
            return f"it has elements of type {header.dtype!r}, which is not known here"
        if header.data_bytes > self.capacity_bytes:
            return (
                f"it takes {header.data_bytes} bytes, and there is room for {self.capacity_bytes} here; raise "
                "--ec-receive-bytes"
            )
        return None

    # ---- states and room ----------------------------------------------------------------------------------------------

    def _ask(self, item: _Item[EntryT]) -> None:
        self._unsent += [(item, place) for place in item.places]

    def _wait(self, item: _Item[EntryT]) -> None:
        item.stage, item.source, item.entry = _Stage.WAITING, None, None

    def _withdraw(self, item: _Item[EntryT], place: ECPlace) -> None:
        """Expect nothing of one item from a place."""
        item.places.pop(place, None)
        if item.stage is _Stage.ASKED and item.source == place:
            self._wait(item)

    def _drop(self, item: _Item[EntryT]) -> None:
        if item.stage in (_Stage.WAITING, _Stage.ASKED):
            self._sends += [Send(place, Forget(item.identifier)) for place in item.places]
        del self._items[item.identifier]

    def _ordered(self) -> Iterator[_Item[EntryT]]:
        names = dict.fromkeys(chain(self._needed, *self._requests.values()))
        return (self._items[name] for name in names if name in self._items)

    def _plan(self) -> None:
        """Ask for what has room now, and tell the places of the rest that it is wanted."""
        room = self.capacity_bytes - self.held_bytes
        allowed: set[str] = set()
        for item in self._ordered():
            if item.stage is not _Stage.WAITING:
                continue
            need = item.size_bytes or min(item.max_rows * self._row_bytes, self.capacity_bytes)
            if need > room:
                room += self._reclaim(item, need - room)
            room -= need
            if room < 0:
                break
            allowed.add(item.identifier)
            having = [place for place, here in item.places.items() if here is not None]
            if having:
                item.stage, item.source = _Stage.ASKED, having[-1]
                self._sends.append(Send(having[-1], Take(item.identifier)))
        unsent, self._unsent = self._unsent, []
        for item, place in unsent:
            waits = item.stage in (_Stage.WAITING, _Stage.ASKED) and self._items.get(item.identifier) is item
            if waits and item.places.get(place, item) is None:
                need = item.size_bytes or item.max_rows * self._row_bytes
                room_bytes = HEADER_BYTES + need if need and item.identifier in allowed else 0
                self._sends.append(Send(place, Want(item.identifier, room_bytes)))

    def _reclaim(self, first: _Item[EntryT], needed_bytes: int) -> int:
        """Give up entries that are ready, the last ones first, for one that comes before them; return their size."""
        order = list(self._ordered())
        later = [item for item in order[order.index(first) + 1 :] if item.stage is _Stage.READY]
        if sum(item.size_bytes for item in later) < needed_bytes:
            return 0
        reclaimed = 0
        while reclaimed < needed_bytes:
            item = later.pop()
            reclaimed += item.size_bytes
            self._wait(item)
            self._ask(item)
        return reclaimed
