"""Writing behind never delays whoever gives entries away."""

from __future__ import annotations

import threading

import pytest

from chiasm.ec_transfer.stores import Store, StoredEntry, StoreError, StoreFullError, StoreHealth
from chiasm.ec_transfer.stores.address import StoreAddress
from chiasm.ec_transfer.stores.writer import Writer

from .conftest import entry_of


class HeldStore(Store):
    """Writes when it is let, and then fails if it is told to."""

    def __init__(self) -> None:
        super().__init__(StoreAddress("redis", host="held", port=1))
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.error: StoreError | None = None
        self.written: list[str] = []
        self.ended = threading.Semaphore(0)

    def put(self, entry: StoredEntry, data: memoryview) -> None:
        self.begun.set()
        try:
            assert self.go_on.wait(30)
            if self.error is not None:
                raise self.error
            self.written.append(entry.identifier)
        finally:
            self.ended.release()

    def exists_many(self, identifiers: object, fingerprint: str) -> list[StoredEntry | None]:
        raise AssertionError

    def get_into(self, entry: StoredEntry, buffer: memoryview) -> None:
        raise AssertionError

    def health(self) -> StoreHealth:
        raise AssertionError

    def close(self) -> None:
        raise AssertionError


@pytest.fixture
def store() -> HeldStore:
    return HeldStore()


def offer(writer: Writer, number: int, size_bytes: int = 400) -> None:
    entry, data = entry_of(number, size_bytes)
    writer.offer(entry.identifier, size_bytes, lambda: (entry, data))


def test_entries_are_written_in_the_order_in_which_they_came(store: HeldStore) -> None:
    writer = Writer(store, 10_000)
    for number in (3, 1, 2, 1):
        offer(writer, number)
    store.go_on.set()
    for _ in range(3):
        assert store.ended.acquire(timeout=30)
    writer.stop()
    assert store.written == [f"{number:064x}" for number in (3, 1, 2)]


def test_what_does_not_fit_in_the_queue_is_dropped_and_counted(store: HeldStore) -> None:
    writer = Writer(store, 1000)
    for number in range(5):
        offer(writer, number)
    assert writer.stats.dropped == 3
    assert writer.stats.queued_bytes == 800
    writer.stop()
    store.go_on.set()


@pytest.mark.usefixtures("faults_are_remembered")
def test_after_a_fault_entries_are_dropped_at_once(store: HeldStore) -> None:
    store.error = StoreFullError("full")
    store.go_on.set()
    writer = Writer(store, 10_000)
    offer(writer, 1)
    assert store.ended.acquire(timeout=30)
    while writer.stats.write_failures == 0:
        pass  # the thread is about to count it
    offer(writer, 2)
    assert writer.stats.dropped == 1
    assert writer.stats.queued_bytes == 0
    writer.stop()


def test_stopping_drops_what_waits(store: HeldStore) -> None:
    writer = Writer(store, 10_000)
    offer(writer, 1)
    assert store.begun.wait(30)
    offer(writer, 2)
    writer.stop()
    offer(writer, 3)
    assert writer.stats.dropped == 2
    assert writer.stats.queued_bytes == 400  # the one that is being written
    store.go_on.set()
