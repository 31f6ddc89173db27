"""Accounting for the embeddings in memory: which are there, who needs them, and which are evicted when room is short."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Set
from dataclasses import dataclass, field

Rank = tuple[bool, float, int]
"""Who comes first for room, lowest first: whether the sequence still waits to run, then its place in the order of due."""


@dataclass
class _Entry:
    num_bytes: int
    holders: dict[str, Rank] = field(default_factory=dict)
    """Ranks of the sequences that still need it, by sequence."""


class EncoderCacheManager:
    """Bounds the encoder cache. Pure bookkeeping: :class:`~chiasm.engine.embeddings.Embeddings` has the tensors.

    An entry is held by the sequences whose prefill has not passed it. Entries that no sequence holds are evicted first, least
    recently used first. If only held ones are left, a sequence may evict those of later sequences, and those that it needs
    later itself, so that the first sequence can always continue; an evicted entry is loaded again when it is needed.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.changes = 0
        """Grows whenever an entry comes or goes, or is needed by fewer."""
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._evicted: list[str] = []
        self.moved: set[str] = set()
        """Identifiers of entries that have come or gone. Who acts on that clears it."""

    def __contains__(self, identifier: str) -> bool:
        return identifier in self._entries

    @property
    def identifiers(self) -> Set[str]:
        """Identifiers of all entries that have room."""
        return self._entries.keys()

    def allocate(self, identifier: str, num_bytes: int, *, rank: Rank, keep: Set[str] = frozenset()) -> bool:
        """Make room for an entry that the sequence with this rank needs; return False if there is none.

        Entries in ``keep`` stay: those that the sequence needs before this one, and those that the step uses already.
        """
        if identifier in self._entries:
            return True
        victims: list[str] = []
        room = self.capacity_bytes - self.used_bytes
        if room < num_bytes:
            others = {name: entry.holders for name, entry in self._entries.items() if name not in keep}
            unheld = [name for name, holders in others.items() if not holders]
            later = [name for name, holders in others.items() if holders and min(holders.values()) >= rank]
            later.sort(key=lambda name: min(self._entries[name].holders.values()), reverse=True)
            for name in unheld + later:
                victims.append(name)
                room += self._entries[name].num_bytes
                if room >= num_bytes:
                    break
        if room < num_bytes:
            return False
        for name in victims:
            self.remove(name)
        self._entries[identifier] = _Entry(num_bytes)
        self.moved.add(identifier)
        self.changes += 1
        self.used_bytes += num_bytes
        return True

    def hold(self, identifier: str, sequence_id: str, rank: Rank) -> None:
        """Note that the sequence needs the entry until it releases it."""
        self._entries[identifier].holders[sequence_id] = rank
        self._entries.move_to_end(identifier)

    def release(self, identifier: str, sequence_id: str) -> None:
        """Note that the sequence no longer needs the entry."""
        entry = self._entries.get(identifier)
        if entry is not None:
            entry.holders.pop(sequence_id, None)
            self.changes += 1

    def remove(self, identifier: str) -> None:
        """Drop the entry, held or not."""
        entry = self._entries.pop(identifier, None)
        if entry is not None:
            self.used_bytes -= entry.num_bytes
            self.moved.add(identifier)
            self.changes += 1
            self._evicted.append(identifier)

    def take_evicted(self) -> list[str]:
        """Return the identifiers dropped since the last call and not allocated again: their tensors are to be freed."""
        evicted = [identifier for identifier in self._evicted if identifier not in self._entries]
        self._evicted.clear()
        return evicted
