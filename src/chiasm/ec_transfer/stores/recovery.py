"""Finding again: what an encoder has lost is read from the store, which takes less than to encode it once more."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError
from typing import TypeVar

from chiasm.ec_transfer.stores.base import Store
from chiasm.ec_transfer.stores.entry import AbsentEntryError, CorruptEntryError, StoredEntry, StoreError
from chiasm.ec_transfer.stores.guard import Guard
from chiasm.ec_transfer.stores.reader import Landing

_log = logging.getLogger(__name__)
_LandingT = TypeVar("_LandingT", bound=Landing)
_SECONDS = 0.002
"""How long the store may take to say whether it has an entry."""
_MAX_MADE = 65536
"""Entries that are known to have been there; the oldest are forgotten."""


class Recovery:
    """Reads entries that were made here. For any number of threads."""

    def __init__(self, store: Store, fingerprint: str) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._guard = Guard(f"Finding lost embeddings in {store.address}")
        self._made: OrderedDict[str, None] = OrderedDict()
        self._asking = ThreadPoolExecutor(1, "chiasm-store-find")

    def note(self, identifier: str) -> None:
        """An entry was made here. Others aren't looked for, since whoever sent them has asked the store already."""
        self._made[identifier] = None
        if len(self._made) > _MAX_MADE:
            self._made.popitem(last=False)

    def was_made(self, identifier: str) -> bool:
        """Whether an entry was made here, as far as is remembered."""
        return identifier in self._made

    def read(
        self,
        identifier: str,
        check: Callable[[StoredEntry], None],
        allocate: Callable[[StoredEntry], _LandingT],
    ) -> _LandingT | None:
        """Return an entry; None if the store doesn't say at once that it has it, or if it can't be read.

        ``check`` raises CorruptEntryError for an entry that can't be the one; ``allocate`` makes memory for one that can.
        """
        try:
            entry = self._find(identifier)
            check(entry)
            landing = allocate(entry)
            with self._guard.use():
                self._store.get_into(entry, landing.buffer)
            landing.finish()
        except CorruptEntryError as error:
            _log.warning("Item %s in %s was rejected: %s.", identifier, self._store.address, error)
            return None
        except (AbsentEntryError, StoreError, LateError):
            return None  # the guard has logged a fault
        except Exception:
            _log.exception("An embedding could not be read from %s.", self._store.address)
            return None
        return landing

    def stop(self) -> None:
        """Ask for nothing any more. A question that is asked now ends on its own, within seconds."""
        self._asking.shutdown(wait=False, cancel_futures=True)

    def _find(self, identifier: str) -> StoredEntry:
        question = self._asking.submit(self._ask, identifier)
        try:
            entry = question.result(_SECONDS)
        finally:
            question.cancel()
        if entry is None:
            raise AbsentEntryError
        return entry

    def _ask(self, identifier: str) -> StoredEntry | None:
        with self._guard.use():
            return self._store.exists_many([identifier], self._fingerprint)[0]
