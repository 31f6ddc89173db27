"""Accounts for the embeddings that are in memory: which are, who needs them, and which go when room is short."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Set
from dataclasses import dataclass, field


@dataclass
class _Entry:
    num_bytes: int
    holders: dict[str, int] = field(default_factory=dict)
    """Sequences that still need it, with their arrival number."""


class EncoderCacheManager:
    """Bounds the encoder cache. Pure bookkeeping: the tensors are in the dict of whoever runs the model.

    An entry is held by the sequences whose prefill has not passed it. Entries that nobody holds go first, least recently
    used first. When only held ones are left, a sequence may take room from those that come after it, or from what it
    needs later itself, so that the oldest can always go on: what was taken is loaded again when its turn comes.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._evicted: list[str] = []

    def __contains__(self, identifier: str) -> bool:
        return identifier in self._entries

    @property
    def identifiers(self) -> Set[str]:
        """Of all entries that have room."""
        return self._entries.keys()

    def allocate(self, identifier: str, num_bytes: int, *, arrival: int, keep: Set[str] = frozenset()) -> bool:
        """Make room for an entry on behalf of a sequence that arrived as number ``arrival``; False if there is none.

        What is in ``keep`` stays: what the sequence needs before this entry, and what the step uses already.
        """
        if identifier in self._entries:
            return True
        victims: list[str] = []
        room = self.capacity_bytes - self.used_bytes
        if room < num_bytes:
            others = {name: entry.holders for name, entry in self._entries.items() if name not in keep}
            unheld = [name for name, holders in others.items() if not holders]
            younger = [name for name, holders in others.items() if holders and min(holders.values()) >= arrival]
            younger.sort(key=lambda name: -min(self._entries[name].holders.values()))
            for name in unheld + younger:
                victims.append(name)
                room += self._entries[name].num_bytes
                if room >= num_bytes:
                    break
        if room < num_bytes:
            return False
        for name in victims:
            self.remove(name)
        self._entries[identifier] = _Entry(num_bytes)
        self.used_bytes += num_bytes
        return True

    def hold(self, identifier: str, sequence_id: str, arrival: int) -> None:
        """The sequence needs the entry until it releases it."""
        self._entries[identifier].holders[sequence_id] = arrival
        self._entries.move_to_end(identifier)

    def release(self, identifier: str, sequence_id: str) -> None:
        """The sequence needs the entry no more, or never got to it."""
        entry = self._entries.get(identifier)
        if entry is not None:
            entry.holders.pop(sequence_id, None)

    def remove(self, identifier: str) -> None:
        """Drop the entry now, held or not."""
        entry = self._entries.pop(identifier, None)
        if entry is not None:
            self.used_bytes -= entry.num_bytes
            self._evicted.append(identifier)

    def take_evicted(self) -> list[str]:
        """Identifiers dropped since the last call, whose tensors are to be freed, unless they came back since."""
        evicted = [identifier for identifier in self._evicted if identifier not in self._entries]
        self._evicted.clear()
        return evicted
