"""Which embeddings are published where, as far as this proxy knows: at the encoders, or in the store that all of them share.

State only: no clock and no I/O. Encoders and stores hold the embeddings that were used last, and don't say how many. An answer
that an embedding was there, or wasn't, tells how far back the memory of an encoder or store reaches.
"""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from weakref import WeakKeyDictionary

from chiasm.proxy.instance import Instance
from chiasm.proxy.prompts import ItemWork

_MOST = 65536
"""Embeddings of which is known that one encoder, or the store, has them."""


class Published:
    """An encoder that is restarted, or comes back with another memory, has nothing."""

    def __init__(self) -> None:
        self.copies: dict[str, int] = {}
        """How many memories have each embedding that any has."""
        self._store = Shelf("", self.copies)
        self._shelves: WeakKeyDictionary[Instance, Shelf] = WeakKeyDictionary()

    def at(self, encoder: Instance) -> Shelf:
        """Return what an encoder has: in its memory if it serves embeddings from there, otherwise in the common store."""
        place = encoder.ec_place
        if place is None:
            return self._store
        shelf = self._shelves.get(encoder)
        if shelf is None or shelf.engine_id != place.engine_id:
            if shelf is not None:
                shelf.clear()
            shelf = self._shelves[encoder] = Shelf(place.engine_id, self.copies)
            weakref.finalize(encoder, shelf.clear)
        return shelf

    def note(self, encoder: Instance, item: ItemWork, was_there: bool | None) -> None:
        """Note that an encoder has published an embedding; ``was_there`` if it had it before, None if it doesn't say."""
        self.at(encoder).note(item.identifier, encoder.costs.image_tokens(item.pixels), was_there)

    def note_lost(self, identifier: str) -> None:
        """Note that an embedding is gone, wherever it was."""
        for shelf in (self._store, *self._shelves.values()):
            shelf.drop(identifier)


class Shelf:
    """The embeddings that one memory holds, the least recently used first, each with its size in tokens."""

    def __init__(self, engine_id: str, copies: dict[str, int]) -> None:
        """``copies`` counts the embeddings of all memories."""
        self.engine_id = engine_id
        self._copies = copies
        self.entries: OrderedDict[str, float] = OrderedDict()
        self._tokens = 0.0
        self._limit = math.inf

    def __contains__(self, identifier: str) -> bool:
        return identifier in self.entries

    def __len__(self) -> int:
        return len(self.entries)

    def note(self, identifier: str, tokens: float, was_there: bool | None) -> None:
        if was_there is False and identifier in self.entries:
            # What has been used since is all that the memory holds; but one embedding may be gone for another reason.
            self._limit = max(self._newer_than(identifier), min(self._limit, self._tokens) / 2)
        elif was_there and identifier not in self.entries:
            self._limit += tokens
        self.drop(identifier)
        self.entries[identifier] = tokens
        self._copies[identifier] = self._copies.get(identifier, 0) + 1
        self._tokens += tokens
        while len(self.entries) > 1 and (self._tokens > self._limit or len(self.entries) > _MOST):
            self.drop(next(iter(self.entries)))

    def drop(self, identifier: str) -> None:
        tokens = self.entries.pop(identifier, None)
        if tokens is None:
            return
        self._tokens -= tokens
        if self._copies[identifier] > 1:
            self._copies[identifier] -= 1
        else:
            del self._copies[identifier]

    def clear(self) -> None:
        """Forget all, because the memory is gone."""
        for identifier in list(self.entries):
            self.drop(identifier)

    def _newer_than(self, identifier: str) -> float:
        tokens = 0.0
        for name in reversed(self.entries):
            if name == identifier:
                break
            tokens += self.entries[name]
        return tokens
