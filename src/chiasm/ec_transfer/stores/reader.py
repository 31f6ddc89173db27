"""Reading ahead: what requests want and the store has comes into bounded memory, on threads of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeAlias, TypeVar

from chiasm.ec_transfer.stores.base import Store
from chiasm.ec_transfer.stores.entry import AbsentEntryError, CorruptEntryError, StoredEntry, StoreError
from chiasm.ec_transfer.stores.guard import Guard

_log = logging.getLogger(__name__)
_THREADS = 2
"""One reads while the other waits for the store, or copies to a device."""


@dataclass
class StoreReads:
    """Counters of what was read from a store."""

    reads: int = 0
    read_bytes: int = 0
    read_seconds: float = 0.0
    absent: int = 0
    """The store had it when the proxy asked, and has it no more."""
    corrupt: int = 0
    """What the store had was not the entry, or another than the request needs."""
    read_failures: int = 0
    """The store was down or slow, refused, or has failed lately."""


class Landing(Protocol):
    """Memory for one entry."""

    @property
    def buffer(self) -> memoryview: ...

    def finish(self) -> None:
        """Called when the buffer is filled and verified, on the reader's thread."""


Rank: TypeAlias = tuple[int, int]
"""Lower for what is needed earlier."""
LandingT = TypeVar("LandingT", bound=Landing)


class _Read(Generic[LandingT]):
    """One entry that is wanted. Compared by identity."""

    def __init__(self, identifier: str, rank: Rank, check: Callable[[StoredEntry], None]) -> None:
        self.identifier = identifier
        self.rank = rank
        self.check = check
        self.entry: StoredEntry | None = None
        """Its header, once that was read."""
        self.is_begun = False
        """Whether a thread works on it, or has done so."""
        self.held_bytes = 0
        """What it takes of the memory."""
        self.landing: LandingT | None = None
        """Set when it is ready."""
        self.is_promised = False
        """Whether it must stay until it is taken."""


class Reader(Generic[LandingT]):
    """Reads entries, those of the lowest rank first, into at most ``max_bytes``.

    What is ready and not taken makes way for what is needed earlier; it is read again then.
    """

    def __init__(
        self,
        store: Store,
        fingerprint: str,
        *,
        max_bytes: int,
        allocate: Callable[[StoredEntry], LandingT],
        is_elsewhere: Callable[[str], bool],
        on_change: Callable[[], None],
    ) -> None:
        """``is_elsewhere`` says that an entry needn't be read, since it comes from somewhere else; ``on_change`` is called when
        an entry is ready, or will not be. Both are called on the reader's threads."""
        self._store = store
        self._fingerprint = fingerprint
        self._max_bytes = max_bytes
        self._allocate = allocate
        self._is_elsewhere = is_elsewhere
        self._on_change = on_change
        self._guard = Guard(f"Reading embeddings from {store.address}")
        self.stats = StoreReads()
        self._reads: dict[str, _Read[LandingT]] = {}
        self._used_bytes = 0
        self._changed = threading.Condition()
        self._is_stopping = False
        self._threads: list[threading.Thread] = []

    def __contains__(self, identifier: str) -> bool:
        """Whether an entry is ready or will be, as far as is known."""
        with self._changed:
            return identifier in self._reads

    def want(self, identifier: str, rank: Rank, check: Callable[[StoredEntry], None]) -> None:
        """Read an entry.

        ``check`` raises CorruptEntryError for an entry that can't be what is wanted, before memory is taken for it.
        """
        with self._changed:
            if identifier in self._reads or self._is_stopping:
                return
            self._reads[identifier] = _Read(identifier, rank, check)
            while len(self._threads) < _THREADS:
                name = f"chiasm-store-read-{len(self._threads)}"
                self._threads.append(threading.Thread(target=self._run, name=name, daemon=True))
                self._threads[-1].start()
            self._changed.notify()

    def promise(self, identifier: str, rank: Rank) -> bool:
        """Return whether an entry is ready; if so, it stays until it is taken or ``end_promises`` is called.

        Otherwise it has this rank from now on.
        """
        with self._changed:
            read = self._reads.get(identifier)
            if read is None:
                return False
            read.rank = rank
            if read.landing is None:
                self._changed.notify_all()
                return False
            read.is_promised = True
            return True

    def end_promises(self) -> None:
        with self._changed:
            for read in self._reads.values():
                read.is_promised = False
            self._changed.notify_all()

    def ready(self, identifier: str) -> LandingT | None:
        """Return an entry that is ready."""
        with self._changed:
            read = self._reads.get(identifier)
            return None if read is None else read.landing

    def take(self, identifier: str) -> LandingT | None:
        """Return an entry that is ready, and forget it."""
        with self._changed:
            read = self._reads.get(identifier)
            if read is None or read.landing is None:
                return None
            self._forget(read)
            return read.landing

    def leave(self, identifier: str) -> None:
        """Note that nobody wants an entry any more."""
        with self._changed:
            if read := self._reads.get(identifier):
                self._forget(read)

    def stop(self) -> None:
        """Forget everything. What is being read ends on its own, within seconds."""
        with self._changed:
            self._is_stopping = True
            self._reads.clear()
            self._changed.notify_all()

    # ---- the threads ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_stopping or self._first() is not None)
                if self._is_stopping:
                    return
                read = self._first()
                assert read is not None
                read.is_begun = True
            self._attempt(read)

    def _first(self) -> _Read[LandingT] | None:
        """Return what is to be done next: the header or the bytes of the earliest entry, which has room for them then."""
        waiting = (read for read in self._reads.values() if not read.is_begun)
        read = min(waiting, key=lambda read: read.rank, default=None)
        if read is None or read.entry is None:
            return read
        return read if read.held_bytes or self._reserve(read, read.entry.size_bytes) else None

    def _attempt(self, read: _Read[LandingT]) -> None:
        """Do the next part of the work for an entry. If that is in vain, it is forgotten, and whoever wants it is told."""
        ended = self._work(read)
        with self._changed:
            is_wanted = self._reads.get(read.identifier) is read
            if ended and read.landing is None and is_wanted:
                del self._reads[read.identifier]
            if not is_wanted or read.identifier not in self._reads:
                self._give_back(read)
            self._changed.notify_all()
        if is_wanted and ended:
            self._on_change()

    def _work(self, read: _Read[LandingT]) -> bool:
        """Read the header, or the bytes; return whether nothing is left to do, since all is read or can't be."""
        try:
            if read.entry is not None:
                self._fill(read)
                return True
            if not self._is_elsewhere(read.identifier):
                self._find(read)
                return False
        except AbsentEntryError:
            self._count(absent=1)
        except CorruptEntryError as error:
            self._count(corrupt=1)
            _log.warning("Item %s in %s was rejected: %s.", read.identifier, self._store.address, error)
        except StoreError:
            self._count(read_failures=1)  # the guard has logged it
        except Exception:
            self._count(read_failures=1)
            _log.exception("An embedding could not be read from %s.", self._store.address)
        return True

    def _count(self, *, absent: int = 0, corrupt: int = 0, read_failures: int = 0) -> None:
        with self._changed:
            self.stats.absent += absent
            self.stats.corrupt += corrupt
            self.stats.read_failures += read_failures

    def _find(self, read: _Read[LandingT]) -> None:
        """Read the header, and let the entry wait for room."""
        with self._guard.use():
            (entry,) = self._store.exists_many([read.identifier], self._fingerprint)
        if entry is None:
            raise AbsentEntryError
        read.check(entry)
        if entry.size_bytes > self._max_bytes:
            raise CorruptEntryError(f"it takes {entry.size_bytes} bytes, but at most {self._max_bytes} are read")
        with self._changed:
            read.entry, read.is_begun = entry, False

    def _fill(self, read: _Read[LandingT]) -> None:
        """Read the bytes into memory that was reserved."""
        assert read.entry is not None
        started = time.perf_counter()
        landing = self._allocate(read.entry)
        with self._guard.use():
            self._store.get_into(read.entry, landing.buffer)
        landing.finish()
        with self._changed:
            self.stats.reads += 1
            self.stats.read_bytes += read.entry.size_bytes
            self.stats.read_seconds += time.perf_counter() - started
            read.landing = landing

    # ---- memory, under the lock ----------------------------------------------------------------------------------------

    def _reserve(self, read: _Read[LandingT], size_bytes: int) -> bool:
        """Take memory, if need be from what is ready and needed later."""
        ready = [one for one in self._reads.values() if one.landing is not None and not one.is_promised]
        for one in sorted(ready, key=lambda one: one.rank, reverse=True):
            if self._used_bytes + size_bytes <= self._max_bytes or one.rank < read.rank:
                break
            self._used_bytes -= one.held_bytes
            one.landing, one.held_bytes, one.is_begun = None, 0, False  # read again later
        if self._used_bytes + size_bytes > self._max_bytes:
            return False
        read.held_bytes = size_bytes
        self._used_bytes += size_bytes
        return True

    def _forget(self, read: _Read[LandingT]) -> None:
        del self._reads[read.identifier]
        if read.landing is not None or not read.is_begun:  # otherwise its thread still writes there, and gives it back
            self._give_back(read)

    def _give_back(self, read: _Read[LandingT]) -> None:
        self._used_bytes -= read.held_bytes
        read.held_bytes = 0
        self._changed.notify_all()
