"""Embeddings in the simulation: which ones can be loaded. What they hold doesn't matter, only their size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class Store:
    """Identifiers of the embeddings in one memory. For new ones, the least recently used are removed."""

    def __init__(self, capacity_bytes: float) -> None:
        self._capacity_bytes = capacity_bytes
        self._entries: OrderedDict[str, float] = OrderedDict()
        self._used_bytes = 0.0

    def __contains__(self, identifier: object) -> bool:
        return identifier in self._entries

    def touch(self, identifier: str) -> None:
        """Note that an embedding is used."""
        self._entries.move_to_end(identifier)

    def add(self, identifier: str, num_bytes: float) -> None:
        """Store an embedding, or note that it is used if it is there."""
        if identifier in self._entries:
            self.touch(identifier)
            return
        self._entries[identifier] = num_bytes
        self._used_bytes += num_bytes
        while self._used_bytes > self._capacity_bytes and len(self._entries) > 1:
            _, removed = self._entries.popitem(last=False)
            self._used_bytes -= removed


class Stores:
    """The memories of all encoders, from any of which a language model takes embeddings."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self._stores = stores

    def __contains__(self, identifier: object) -> bool:
        return any(identifier in store for store in self._stores)
