"""Writing behind: encoders give embeddings to a store without ever waiting for it."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from chiasm.ec_transfer.stores.base import Store
from chiasm.ec_transfer.stores.entry import StoredEntry, StoreError
from chiasm.ec_transfer.stores.guard import Guard

_log = logging.getLogger(__name__)


@dataclass
class StoreWrites:
    """Counters of what was written to a store."""

    writes: int = 0
    written_bytes: int = 0
    write_failures: int = 0
    """The store was down, slow or full, or refused."""
    dropped: int = 0
    """Not written, because the queue was full or the store has failed lately."""
    queued_bytes: int = 0
    """What waits or is being written now."""
    restored: int = 0
    """Lost here, and read from the store in place of being encoded again."""
    not_restored: int = 0
    """Lost here, and encoded again: the store didn't have it, or didn't say so at once."""


class _Pending(NamedTuple):
    size_bytes: int
    make: Callable[[], tuple[StoredEntry, memoryview]]


class Writer:
    """A thread that writes entries in the order in which they came. What waits takes at most ``max_bytes``."""

    def __init__(self, store: Store, max_bytes: int) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._guard = Guard(f"Writing embeddings to {store.address}")
        self.stats = StoreWrites()
        self._queue: OrderedDict[str, _Pending] = OrderedDict()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._thread: threading.Thread | None = None

    def offer(self, identifier: str, size_bytes: int, make: Callable[[], tuple[StoredEntry, memoryview]]) -> None:
        """Have an entry written if there is room in the queue; otherwise drop it. Returns at once.

        ``make`` is called on the writer's thread and returns the entry with its bytes.
        """
        with self._changed:
            if identifier in self._queue:
                return
            if self.stats.queued_bytes + size_bytes > self._max_bytes or self._is_stopping or not self._guard.is_open:
                self.stats.dropped += 1
                return
            self._queue[identifier] = _Pending(size_bytes, make)
            self.stats.queued_bytes += size_bytes
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="chiasm-store-write", daemon=True)
                self._thread.start()
            self._changed.notify()

    def note_restored(self, is_restored: bool) -> None:
        """Count an entry that was lost here."""
        with self._changed:
            self.stats.restored += is_restored
            self.stats.not_restored += not is_restored

    def stop(self) -> None:
        """Drop what waits. What is being written may go on for a while, on a thread that keeps no process alive."""
        with self._changed:
            self._is_stopping = True
            self.stats.dropped += len(self._queue)
            self.stats.queued_bytes -= sum(pending.size_bytes for pending in self._queue.values())
            self._queue.clear()
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_stopping)
                if self._is_stopping:
                    return
                _, pending = self._queue.popitem(last=False)
            written = self._write(pending)
            with self._changed:
                self.stats.queued_bytes -= pending.size_bytes
                if written:
                    self.stats.writes += 1
                    self.stats.written_bytes += pending.size_bytes
                else:
                    self.stats.write_failures += 1

    def _write(self, pending: _Pending) -> bool:
        try:
            entry, data = pending.make()
            with self._guard.use():
                self._store.put(entry, data)
            return True
        except StoreError:
            return False  # the guard has logged it
        except Exception:
            _log.exception("An embedding could not be written to %s.", self._store.address)
            return False
