"""Reading ahead: what requests want and the store has comes into bounded memory, on threads of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from chiasm.cores import ARRIVAL_NICE, lower_priority
from chiasm.ec_transfer.intake import Intake, Stage, Wanted
from chiasm.ec_transfer.stores.base import Store
from chiasm.ec_transfer.stores.entry import AbsentEntryError, CorruptEntryError, StoredEntry, StoreError
from chiasm.ec_transfer.stores.guard import Guard
from chiasm.ec_transfer.wake import Wake

_log = logging.getLogger(__name__)
_THREADS = 2
"""One reads while the other waits for the store, or copies to a device."""
_MAX_TOLD = 65536
"""Entries that the store is said to have and no request has wanted yet; the oldest are forgotten."""


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


LandingT = TypeVar("LandingT", bound=Landing)


@dataclass(eq=False)
class _Read(Wanted[LandingT]):
    header: StoredEntry | None = None
    """Once it was read, until it turns out that the store doesn't have the entry, or the engine has it."""


class Reader(Generic[LandingT]):
    """Reads what requests want and the store is said to have into at most ``max_bytes``.

    What comes first, and what makes way for it and is read again then, is said in ``intake``. The methods may be called from
    any thread.
    """

    def __init__(
        self,
        store: Store,
        fingerprint: str,
        *,
        max_bytes: int,
        check: Callable[[StoredEntry, int], None],
        allocate: Callable[[StoredEntry], LandingT],
        is_elsewhere: Callable[[str], bool],
    ) -> None:
        """All three are called on the reader's threads.

        ``check`` raises CorruptEntryError for an entry that can't be what is wanted, given the most rows that it may have;
        ``allocate`` makes memory for one that can. ``is_elsewhere`` says that an entry needn't be read, since it comes from
        somewhere else. ``wake`` can be set; it is called, on the same threads, when an entry is ready, or will not be.
        """
        self._store = store
        self._fingerprint = fingerprint
        self._max_bytes = max_bytes
        self._check = check
        self._allocate = allocate
        self._is_elsewhere = is_elsewhere
        self.wake: Wake = lambda arrived="", /: None
        self._guard = Guard(f"Reading embeddings from {store.address}")
        self.stats = StoreReads()
        self._told: OrderedDict[str, None] = OrderedDict()
        """What the store is said to have, until it is looked for there."""
        self._changed = threading.Condition()
        self._intake: Intake[_Read[LandingT], LandingT] = Intake(
            _Read, lambda read: self._changed.notify_all(), max_bytes=max_bytes
        )
        self._is_stopping = False
        self._threads: list[threading.Thread] = []

    def tell(self, stored: Iterable[str], elsewhere: Iterable[str] = ()) -> None:
        """The store is said to have some entries, and others are said to come from somewhere else."""
        with self._changed:
            for identifier in elsewhere:
                self._told.pop(identifier, None)
            for identifier in stored:
                self._told.pop(identifier, None)
                self._told[identifier] = None
            while len(self._told) > _MAX_TOLD:
                self._told.popitem(last=False)
            while self._told and len(self._threads) < _THREADS and not self._is_stopping:
                name = f"chiasm-store-read-{len(self._threads)}"
                self._threads.append(threading.Thread(target=self._run, name=name, daemon=True))
                self._threads[-1].start()
            self._changed.notify_all()

    def want(self, request_id: str, identifier: str, max_rows: int) -> None:
        """A request wants an entry. It is read when it is asked for."""
        with self._changed:
            self._intake.want(request_id, identifier, max_rows, is_needed=False)

    def finish(self, request_id: str, identifiers: Iterable[str]) -> None:
        """The request wants none of these any more."""
        with self._changed:
            self._intake.finish(request_id, identifiers)
            self._changed.notify_all()

    def ask(self, identifier: str) -> bool:
        """Return whether a wanted entry is ready; if so, it stays until ``end_round``. See ``Intake.ask``."""
        with self._changed:
            return self._intake.ask(identifier)

    def end_round(self) -> None:
        """End the order in which the scheduler has asked, and the promises that it got."""
        with self._changed:
            self._intake.end_round()
            self._changed.notify_all()

    def is_coming(self, identifier: str) -> bool:
        """Whether an entry is ready or will be, as far as is known."""
        with self._changed:
            read = self._intake.get(identifier)
            return identifier in self._told or (
                read is not None and (read.header is not None or read.stage is Stage.COMING)
            )

    def ready(self, identifier: str) -> LandingT | None:
        """Return an entry that is ready."""
        with self._changed:
            return self._intake.ready(identifier)

    def take(self, identifier: str) -> LandingT | None:
        """Return an entry that is ready, and keep it no longer."""
        with self._changed:
            landing = self._intake.take(identifier)
            if landing is not None:
                self._forget(identifier)
            return landing

    def discard(self, identifier: str) -> None:
        """What was read is of no use."""
        with self._changed:
            self._intake.take(identifier)
            self._forget(identifier)

    def _forget(self, identifier: str) -> None:
        """Don't read an entry again before the store is said to have it. Under the lock."""
        if read := self._intake.get(identifier):
            read.header = None
        self._changed.notify_all()

    def stop(self) -> None:
        """Forget everything. What is being read ends on its own, within seconds."""
        with self._changed:
            self._is_stopping = True
            self._intake.clear()
            self._told.clear()
            self._changed.notify_all()

    # ---- the threads ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        lower_priority(ARRIVAL_NICE)
        while True:
            with self._changed:
                while not self._is_stopping and (read := self._next()) is None:
                    self._changed.wait()
                if self._is_stopping:
                    return
                assert read is not None
            self._attempt(read)

    def _next(self) -> _Read[LandingT] | None:
        """Begin with the first entry whose header is to be read, or its bytes, for which there must be room. Under the lock."""
        for read in self._intake.in_order(Stage.WAITING):
            if read.header is None and read.identifier in self._told:
                del self._told[read.identifier]
                self._intake.come(read, 0)
                return read
            if read.header is not None:
                if not self._intake.reserve(read, read.header.size_bytes):
                    return None
                self._intake.come(read, read.header.size_bytes)
                return read
        return None

    def _attempt(self, read: _Read[LandingT]) -> None:
        """Do the next part of the work for an entry. If that is in vain, it isn't looked for here any more."""
        header, landing = read.header, None
        try:
            if header is not None:
                landing = self._fill(header)
            elif not self._is_elsewhere(read.identifier):
                header = self._find(read)
        except AbsentEntryError:
            header = None
            self._count(absent=1)
        except CorruptEntryError as error:
            header = None
            self._count(corrupt=1)
            _log.warning("Item %s in %s was rejected: %s.", read.identifier, self._store.address, error)
        except StoreError:
            header = None
            self._count(read_failures=1)  # the guard has logged it
        except Exception:
            header = None
            self._count(read_failures=1)
            _log.exception("An embedding could not be read from %s.", self._store.address)
        with self._changed:
            read.header = header
            is_wanted = self._intake.fail(read) if landing is None else self._intake.arrive(read, landing)
            self._changed.notify_all()
        if is_wanted and (landing is not None or header is None):
            self.wake(read.identifier if landing is not None else "")

    def _count(self, *, absent: int = 0, corrupt: int = 0, read_failures: int = 0) -> None:
        with self._changed:
            self.stats.absent += absent
            self.stats.corrupt += corrupt
            self.stats.read_failures += read_failures

    def _find(self, read: _Read[LandingT]) -> StoredEntry:
        """Read the header."""
        with self._guard.use():
            (entry,) = self._store.exists_many([read.identifier], self._fingerprint)
        if entry is None:
            raise AbsentEntryError
        self._check(entry, read.max_rows)
        if entry.size_bytes > self._max_bytes:
            raise CorruptEntryError(f"it takes {entry.size_bytes} bytes, but at most {self._max_bytes} are read")
        return entry

    def _fill(self, entry: StoredEntry) -> LandingT:
        """Read the bytes, for which there is room."""
        started = time.perf_counter()
        landing = self._allocate(entry)
        with self._guard.use():
            self._store.get_into(entry, landing.buffer)
        landing.finish()
        with self._changed:
            self.stats.reads += 1
            self.stats.read_bytes += entry.size_bytes
            self.stats.read_seconds += time.perf_counter() - started
        return landing
