"""The table of what a holder offers, who wants it, and who may read it now. It has no sockets, no clock and no memory.

An entry is reserved, written, and then published. Those who want it are told, and may be granted it. What is granted stays;
everything else is evicted, the least recently used first, when room is needed.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from chiasm.ec_transfer.entry_file import EntryHeader
from chiasm.ec_transfer.peer_messages import MAX_WANTED, Gone, Here

PieceT = TypeVar("PieceT")


class NoRoom(Exception):
    """There is no room for an entry, because everything that is left is being read."""


class TooManyWanted(Exception):
    """A reader wants more than it may."""


class Notice(NamedTuple):
    """A message to one reader."""

    reader: int
    message: Here | Gone


@dataclass(eq=False)
class _Entry(Generic[PieceT]):
    piece: PieceT
    begin: int
    end: int
    """Where its piece of memory begins and ends."""
    size_bytes: int
    header: EntryHeader | None = None
    """None while it is written."""
    granted: set[int] = field(default_factory=set)
    told: set[int] = field(default_factory=set)
    """The readers that know of it and have no grant."""


class Reserved(NamedTuple, Generic[PieceT]):
    """Room for one entry."""

    piece: PieceT
    evictions: int
    evicted_bytes: int


class OfferTable(Generic[PieceT]):
    """The entries of one holder. ``reader`` is a number that stands for a connection.

    ``allocate`` returns a piece of the memory, which has ``num_bytes``, or None if there is no room for it; ``range_of`` says
    where a piece begins and ends; ``free`` takes it back. What ``is_used`` by somebody else is not worth evicting, since its
    memory wouldn't be free.
    """

    def __init__(
        self,
        num_bytes: int,
        allocate: Callable[[int], PieceT | None],
        range_of: Callable[[PieceT], tuple[int, int]],
        free: Callable[[PieceT], None],
        is_used: Callable[[PieceT], bool],
    ) -> None:
        self._num_bytes = num_bytes
        self._allocate = allocate
        self._range_of = range_of
        self._free = free
        self._is_used = is_used
        self._entries: OrderedDict[str, _Entry[PieceT]] = OrderedDict()  # the least recently used comes first
        self._wanted: dict[str, dict[int, int]] = {}
        """The room of each reader that waits for an entry, by identifier."""
        self._wanted_by: dict[int, set[str]] = {}
        """The identifiers that a reader wants, was told of, or was granted."""
        self._num_granted: Counter[int] = Counter()
        """How many entries each reader may read, if any."""
        self._retired: dict[str, list[_Entry[PieceT]]] = {}
        """Entries that were given up, and that somebody still reads."""
        self._notices: list[Notice] = []

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def has_notices(self) -> bool:
        """Whether a reader is to be told something."""
        return bool(self._notices)

    def take_notices(self) -> list[Notice]:
        """Return what is to be told to readers, in this order, and forget it."""
        notices, self._notices = self._notices, []
        return notices

    def is_granted(self, reader: int) -> bool:
        """Return whether the reader may read anything now."""
        return self._num_granted[reader] > 0

    def claimed(self) -> set[str]:
        """Return the identifiers of what readers were told of or granted, and have neither fetched nor forgotten."""
        names = {name for wanted in self._wanted_by.values() for name in wanted}
        return {name for name in names if any(entry.told or entry.granted for entry in self._all(name))}

    # ---- the holder's own ---------------------------------------------------------------------------------------------

    def has(self, identifier: str) -> bool:
        """Return whether the entry is published. That counts as use."""
        entry = self._entries.get(identifier)
        if entry is None or entry.header is None:
            return False
        self._entries.move_to_end(identifier)
        return True

    def reserve(self, identifier: str, size_bytes: int) -> Reserved[PieceT] | None:
        """Make room for an entry, which is to be published or abandoned. None if it exists, or is being written.

        Evicts as few as needed. Raises NoRoom if that isn't enough.
        """
        if identifier in self._entries:
            return None
        evictions = evicted_bytes = 0
        victims = self._victims(size_bytes)
        while (piece := self._allocate(size_bytes)) is None:
            victim = next(victims, None)
            if victim is None:
                raise NoRoom
            evictions += 1
            evicted_bytes += self._entries[victim].size_bytes
            self.remove(victim)
        self._entries[identifier] = _Entry(piece, *self._range_of(piece), size_bytes)
        return Reserved(piece, evictions, evicted_bytes)

    def publish(self, identifier: str, header: EntryHeader) -> None:
        """An entry that was reserved is written. Those who want it are told."""
        entry = self._entries[identifier]
        entry.header = header
        for reader, room_bytes in self._wanted.pop(identifier, {}).items():
            self._tell(reader, identifier, entry, granted=entry.size_bytes <= room_bytes)

    def abandon(self, identifier: str) -> None:
        """An entry that was reserved is not written after all."""
        self._free(self._entries.pop(identifier).piece)

    def remove(self, identifier: str) -> None:
        """Give up an entry that is published. Its memory is free when nobody reads it any more."""
        entry = self._entries.get(identifier)
        if entry is None or entry.header is None:
            return
        del self._entries[identifier]
        for reader in sorted(entry.told):
            if not self._reads_retired(reader, identifier):
                self._names(reader).discard(identifier)
            self._notices.append(Notice(reader, Gone(identifier)))
        if entry.granted:
            self._retired.setdefault(identifier, []).append(entry)
        else:
            self._free(entry.piece)

    # ---- readers ------------------------------------------------------------------------------------------------------

    def want(self, reader: int, identifier: str, room_bytes: int) -> None:
        """Tell the reader when the entry exists. Raises TooManyWanted."""
        names = self._wanted_by.setdefault(reader, set())
        if identifier not in names and len(names) >= MAX_WANTED:
            raise TooManyWanted
        names.add(identifier)
        if self.has(identifier):
            entry = self._entries[identifier]
            self._tell(reader, identifier, entry, granted=entry.size_bytes <= room_bytes or reader in entry.granted)
        else:
            self._wanted.setdefault(identifier, {})[reader] = room_bytes

    def grant(self, reader: int, identifier: str) -> None:
        """Let the reader read an entry that it was told of, until it says that it is done. It is told whether it may."""
        entry = self._entries.get(identifier)
        if entry is None or reader not in entry.told | entry.granted:
            if not self._reads_retired(reader, identifier):
                self.forget(reader, identifier)
            self._notices.append(Notice(reader, Gone(identifier)))
        else:
            self._entries.move_to_end(identifier)
            self._tell(reader, identifier, entry, granted=True)

    def forget(self, reader: int, identifier: str) -> None:
        """The reader doesn't want the entry, or has read it."""
        self._names(reader).discard(identifier)
        waiting = self._wanted.get(identifier)
        if waiting is not None and waiting.pop(reader, None) is not None and not waiting:
            del self._wanted[identifier]
        for entry in self._all(identifier):
            entry.told.discard(reader)
            if reader in entry.granted:
                entry.granted.remove(reader)
                self._num_granted[reader] -= 1
        for entry in [retired for retired in self._retired.get(identifier, []) if not retired.granted]:
            self._retired[identifier].remove(entry)
            self._free(entry.piece)
        if not self._retired.get(identifier, True):
            del self._retired[identifier]

    def disown(self, reader: int, identifier: str) -> None:
        """The reader says that an entry can't be used, which it may have found out after it gave the grant back."""
        self.forget(reader, identifier)
        self.remove(identifier)

    def leave(self, reader: int) -> None:
        """The reader has gone."""
        for identifier in list(self._names(reader)):
            self.forget(reader, identifier)
        self._wanted_by.pop(reader, None)
        del self._num_granted[reader]

    def _victims(self, size_bytes: int) -> Iterator[str]:
        """Yield what is to be evicted, which the caller then does, until there is room of this size.

        The least recently used comes first. If as many bytes have gone and the room is in parts, neighbours go: otherwise most
        of the small ones would have to go for a large one, since they don't lie in the order of their use.
        """
        freed = 0
        for name in self._least_recent():
            freed += self._entries[name].size_bytes
            yield name
            if freed >= size_bytes:
                break
        if neighbours := self._neighbours(size_bytes):
            yield from neighbours
            yield from self._least_recent()  # if somebody has come between

    def _neighbours(self, size_bytes: int) -> list[str]:
        """Return idle entries whose memory is room of this size in one piece, if there are such.

        Of those that may be chosen, the one that was used last was used as long ago as can be.
        """
        chosen = self._movable(size_bytes, frozenset())
        if any(self._is_used(self._entries[name].piece) for name in chosen):
            used = frozenset(name for name, entry in self._entries.items() if self._is_used(entry.piece))
            chosen = self._movable(size_bytes, used)
        return chosen

    def _movable(self, size_bytes: int, used: frozenset[str]) -> list[str]:
        ranks = {
            name: rank
            for rank, (name, entry) in enumerate(self._entries.items())
            if entry.header is not None and not entry.granted and name not in used
        }
        retired = [(entry.begin, entry.end, "") for entries in self._retired.values() for entry in entries]
        pieces = sorted([*((entry.begin, entry.end, name) for name, entry in self._entries.items()), *retired])
        begins = [*(begin for begin, _, _ in pieces[1:]), self._num_bytes]
        ends = [0, *(end for _, end, _ in pieces)]
        first, best, chosen = 0, len(self._entries), range(0)
        latest: deque[int] = deque()
        """Of the pieces from ``first`` on: the one that was used last, then the last of those behind it, and so on."""
        for last, (_, _, name) in enumerate(pieces):
            if name not in ranks:
                first = last + 1
                latest.clear()
                continue
            while latest and ranks[pieces[latest[-1]][2]] < ranks[name]:
                latest.pop()
            latest.append(last)
            while first <= last and begins[last] - ends[first] >= size_bytes:  # from the piece before to the one behind
                if (rank := ranks[pieces[latest[0]][2]]) < best:
                    best, chosen = rank, range(first, last + 1)
                if latest[0] == first:
                    latest.popleft()
                first += 1
        return [pieces[index][2] for index in chosen]

    def _least_recent(self) -> Iterator[str]:
        """Yield what may be evicted; the least recently used comes first.

        What is in use counts as used now: otherwise it would gather in front, and be looked at again for each new entry.
        """
        for _ in range(len(self._entries)):
            name, entry = next(iter(self._entries.items()))
            if self._is_idle(entry):
                yield name
            else:
                self._entries.move_to_end(name)

    def _is_idle(self, entry: _Entry[PieceT]) -> bool:
        return entry.header is not None and not entry.granted and not self._is_used(entry.piece)

    def _reads_retired(self, reader: int, identifier: str) -> bool:
        return any(reader in entry.granted for entry in self._retired.get(identifier, []))

    def _names(self, reader: int) -> set[str]:
        return self._wanted_by.get(reader, set())

    def _all(self, identifier: str) -> list[_Entry[PieceT]]:
        entry = self._entries.get(identifier)
        return [*self._retired.get(identifier, []), *([entry] if entry is not None else [])]

    def _tell(self, reader: int, identifier: str, entry: _Entry[PieceT], *, granted: bool) -> None:
        header = entry.header
        assert header is not None
        entry.told.discard(reader)
        if not granted:
            entry.told.add(reader)
        elif reader not in entry.granted:
            entry.granted.add(reader)
            self._num_granted[reader] += 1
        here = Here(identifier, entry.begin, header.dtype, list(header.shape), header.checksum, granted)
        self._notices.append(Notice(reader, here))
