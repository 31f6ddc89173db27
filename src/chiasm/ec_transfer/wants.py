"""What a reader wants from other processes, where it may be, and what is read next. It has no sockets, no clock and no memory.

An embedding is read when a request wants it, a place has it, and there is room. What comes first, and what makes way for it, is
said in ``intake``. Room is given in that order also to what no place has yet, so that it can be granted with a holder's first
word.

What a place is told is collected in ``take_sends``, and what is to be read from one in ``take_reads``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from chiasm.ec_transfer.entry_file import HEADER_BYTES, EntryHeader
from chiasm.ec_transfer.intake import Intake, Stage, Wanted
from chiasm.ec_transfer.peer_messages import Bad, Done, Forget, Here, Take, Want
from chiasm.wire import ECPlace

EntryT = TypeVar("EntryT")

MAX_PLACES = 1 << 14
"""Embeddings whose places are kept although no request wants them yet."""
MAX_PLACES_OF_ONE = 2
"""Places of one embedding that are kept: an encoder that is slow may be helped by another."""


class Wish(NamedTuple):
    """An embedding that a request wants, with at most ``max_rows`` rows."""

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


@dataclass(eq=False)
class _Item(Wanted[EntryT]):
    places: dict[ECPlace, Here | None] = field(default_factory=dict)
    """What each place has said. The newest place comes last."""
    source: ECPlace | None = None
    """Where it was asked for, while it waits; else where it comes or came from."""
    size_bytes: int = 0
    """Its size, once it is known."""

    @property
    def is_open(self) -> bool:
        """Whether it is needed and no place was asked for it."""
        return self.stage is Stage.WAITING and self.source is None


class WantTable(Generic[EntryT]):
    """The embeddings that the requests of one reader want.

    ``capacity_bytes`` bounds what is granted, read or ready, and not taken by the engine; a larger entry is never brought in.
    """

    def __init__(self, capacity_bytes: int, fingerprint: str, *, row_bytes: int = 0) -> None:
        """``row_bytes`` is the size of one row of an embedding; 0 if it isn't known before one was seen."""
        self.capacity_bytes = capacity_bytes
        self._fingerprint = fingerprint
        self._intake: Intake[_Item[EntryT], EntryT] = Intake(_Item, self._look_for, max_bytes=capacity_bytes)
        self._has_missed = False
        """Whether the engine has asked in vain in this round."""
        self._expected: OrderedDict[str, dict[ECPlace, Here | None]] = OrderedDict()
        """Where embeddings are that no request wants yet."""
        self._row_bytes = row_bytes
        self._unsent: list[tuple[_Item[EntryT], ECPlace]] = []
        """What wasn't asked for yet."""
        self._sends: list[Send] = []
        self._reads: list[Read] = []

    def __len__(self) -> int:
        return len(self._intake)

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
        """Size of what has room: what is ready or comes, and what is to come first."""
        return self._intake.held_bytes

    def places_in_use(self) -> set[ECPlace]:
        """Return the places from which something may come."""
        return {
            place
            for item in self._intake
            if item.stage in (Stage.WAITING, Stage.COMING)
            for place in (*item.places, item.source)
            if place is not None
        }

    # ---- the engine ---------------------------------------------------------------------------------------------------

    def want(self, request_id: str, wishes: Iterable[Wish]) -> None:
        """A request wants these until ``finish``."""
        for identifier, max_rows, is_needed in wishes:
            item = self._intake.want(request_id, identifier, max_rows, is_needed=is_needed)
            if identifier in self._expected:
                item.places = self._expected.pop(identifier)
                self._look_for(item)
        self._plan()

    def finish(self, request_id: str, identifiers: Iterable[str]) -> None:
        """The request wants none of these any more."""
        for item in self._intake.finish(request_id, identifiers):
            self._leave(item)
        self._plan()

    def ask(self, identifier: str) -> bool:
        """Return whether the entry is ready; if so, it stays until ``end_round``. See ``Intake.ask``."""
        if self._intake.ask(identifier):
            return True
        self._has_missed = True
        if self._unsent:
            self._plan()
        return False

    def end_round(self) -> None:
        """End the order in which the engine has asked, and the promises that it got."""
        self._intake.end_round()
        if self._has_missed:
            self._has_missed = False
            self._plan()

    def is_coming(self, identifier: str) -> bool:
        """Return whether a holder has the entry or it is ready."""
        item = self._intake.get(identifier)
        if item is None:
            return False
        return item.stage is not Stage.WAITING or any(here is not None for here in item.places.values())

    def places_of(self, identifier: str) -> Collection[ECPlace]:
        """Return the places from which a wanted entry may come."""
        item = self._intake.get(identifier)
        return () if item is None else item.places.keys()

    def ready(self, identifier: str) -> EntryT | None:
        """Return the entry if it is ready."""
        return self._intake.ready(identifier)

    def take(self, identifier: str) -> EntryT | None:
        """Return the entry if it is ready. The engine has it now, so it holds no room here any more."""
        entry = self._intake.take(identifier)
        if entry is not None:
            self._plan()
        return entry

    def bring_back(self, identifier: str, entry: EntryT, size_bytes: int) -> None:
        """The engine has given up what it took, and it is still in memory."""
        item = self._intake.get(identifier)
        if item is not None and item.stage is Stage.IDLE:
            self._intake.come(item, size_bytes)
            self._intake.arrive(item, entry)

    def reject(self, identifier: str) -> None:
        """What came is of no use: where it came from shall not offer it any more."""
        item = self._intake.get(identifier)
        if item is None or item.stage not in (Stage.READY, Stage.IDLE):
            return
        if item.source is not None:
            self._sends.append(Send(item.source, Bad(identifier)))
            item.places.pop(item.source, None)
        self._intake.wait(item)
        self._plan()

    # ---- places -------------------------------------------------------------------------------------------------------

    def expect(self, places: Mapping[str, ECPlace]) -> None:
        """These embeddings are or will be there."""
        for identifier, place in places.items():
            item = self._intake.get(identifier)
            if item is None:
                self._keep(identifier, place)
                continue
            here = item.places.pop(place, None)
            item.places[place] = here
            others = [other for other in item.places if other not in (place, item.source)]
            if len(item.places) > MAX_PLACES_OF_ONE and others:
                del item.places[others[0]]
                self._sends.append(Send(others[0], Forget(identifier)))
            if here is None and item.stage is Stage.WAITING and place != item.source:
                self._unsent.append((item, place))
        self._plan()

    def lose(self, place: ECPlace) -> list[str]:
        """Nothing comes from there any more. Return what was to come from there.

        What is being read ends by itself, since some data planes don't need the holder for that.
        """
        lost: list[str] = []
        for item in self._intake:
            is_known = place in item.places
            self._withdraw(item, place)
            if is_known and item.is_open:
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
        item = self._intake.get(here.identifier)
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
        may_come = item.stage is Stage.WAITING and item.source in (None, place)
        if may_come:
            item.size_bytes = header.data_bytes
        if may_come or not here.granted:
            item.places[place] = here
        has_room = item.held_bytes >= header.data_bytes
        if may_come and here.granted and not has_room and not self._intake.reserve(item, header.data_bytes):
            # What is needed first has got its room since: it is asked for again when there is some.
            self._sends += [Send(place, Forget(here.identifier)), Send(place, Want(here.identifier))]
        elif may_come and here.granted:
            self._intake.come(item, header.data_bytes)
            item.source = place
            self._reads.append(Read(place, here, header))
        elif here.granted and item.source != place:  # it comes from elsewhere already
            self._sends.append(Send(place, Forget(here.identifier)))
            del item.places[place]
        self._plan()
        return None

    def gone(self, place: ECPlace, identifier: str) -> bool:
        """A holder has an entry no more. Return whether it has to come from elsewhere now."""
        item = self._intake.get(identifier)
        if item is None or place not in item.places or item.stage in (Stage.READY, Stage.IDLE):
            return False
        if item.stage is Stage.COMING and item.source == place:
            return False
        self._withdraw(item, place)
        self._plan()
        return item.is_open

    def arrived(self, read: Read, entry: EntryT) -> bool:
        """What was read is whole. Return whether a request wants it; otherwise it is dropped."""
        item = self._item_of(read)
        self._sends.append(Send(read.place, Done(item.identifier)))
        self._sends += [Send(place, Forget(item.identifier)) for place in item.places if place != read.place]
        item.places = {read.place: None} if read.place in item.places else {}
        is_wanted = self._intake.arrive(item, entry)
        self._plan()
        return is_wanted

    def failed(self, read: Read, *, bad: bool) -> bool:
        """What was read is not whole. ``bad``: the holder shall not offer it any more. Return whether a request wants it."""
        item = self._item_of(read)
        self._sends.append(Send(read.place, Bad(item.identifier) if bad else Done(item.identifier)))
        self._withdraw(item, read.place)
        is_wanted = self._intake.fail(item)
        if not is_wanted:
            self._leave(item)
        self._plan()
        return is_wanted

    def is_wanted(self, read: Read) -> bool:
        """Return whether a request wants what is being read."""
        return bool(self._item_of(read).requests)

    def _item_of(self, read: Read) -> _Item[EntryT]:
        item = self._intake.get(read.header.identifier)
        assert item is not None, "what is being read stays in the table"
        return item

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

    def _look_for(self, item: _Item[EntryT]) -> None:
        """Ask all places of an item that waits, as soon as it is known what has room."""
        if item.stage is Stage.WAITING:
            item.source = None
            self._unsent += [(item, place) for place in item.places]

    def _withdraw(self, item: _Item[EntryT], place: ECPlace) -> None:
        """Expect nothing of one item from a place."""
        item.places.pop(place, None)
        if item.stage is Stage.WAITING and item.source == place:
            item.source = None

    def _leave(self, item: _Item[EntryT]) -> None:
        """Tell the places of an item that was dropped while it waited."""
        if item.stage in (Stage.WAITING, Stage.COMING):
            self._sends += [Send(place, Forget(item.identifier)) for place in item.places]

    def _plan(self) -> None:
        """Ask for what has room now, and tell the places of the rest that it is wanted."""
        waiting = [item for item in self._intake.in_order(Stage.WAITING) if item.source is None]
        for item in waiting:
            self._intake.release(item)
        for item in waiting:
            need = item.size_bytes or min(item.max_rows * self._row_bytes, self.capacity_bytes)
            if not self._intake.reserve(item, need):
                break
            having = [place for place, here in item.places.items() if here is not None]
            if having:
                item.source = having[-1]
                self._sends.append(Send(having[-1], Take(item.identifier)))
        unsent, self._unsent = self._unsent, []
        for item, place in unsent:
            waits = item.stage is Stage.WAITING and self._intake.get(item.identifier) is item
            if waits and item.places.get(place, item) is None:
                self._sends.append(
                    Send(place, Want(item.identifier, item.held_bytes and HEADER_BYTES + item.held_bytes))
                )
