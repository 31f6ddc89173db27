"""What requests want is brought into memory in a thread of its own, within bounds, and wakes the scheduler."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.ec_transfer import ECTransferRole
from chiasm.ec_transfer.arrivals import Arrivals

from .instance import Instance, Item, Request, config_for, embedding_of, entry_path, identifier_of

SECONDS = 60


class Woken(Instance):
    """A consumer that is woken by arrivals."""

    def __init__(self, folder: Path, *, separate_processes: bool = False) -> None:
        super().__init__(config_for(folder, ECTransferRole.CONSUMER, separate_processes=separate_processes))
        self.news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.scheduler.set_wake(lambda arrived="", /: self.news.put(None))

    def wait(self) -> None:
        self.news.get(timeout=SECONDS)


@pytest.fixture(params=[False, True], ids=["one_process", "two_processes"])
def woken(folder: Path, request: pytest.FixtureRequest) -> Iterator[Woken]:
    instance = Woken(folder, separate_processes=request.param)
    yield instance
    instance.scheduler.shutdown()


def request_for(*names: str, request_id: str = "request") -> Request:
    return Request(tuple(Item(identifier_of(name), offset=10 * i) for i, name in enumerate(names)), request_id)


def test_an_entry_that_is_published_later_wakes_and_is_handed_over(encoder: Instance, woken: Woken) -> None:
    request = request_for("a")
    assert not woken.scheduler.ensure_cache_available(request, 0)
    assert not woken.scheduler.has_cache_item(identifier_of("a"))
    encoder.encode("a")
    woken.wait()
    woken.step(request)
    assert torch.equal(woken.encoder_cache[identifier_of("a")], embedding_of("a"))


def test_what_has_arrived_needs_no_file(encoder: Instance, woken: Woken, folder: Path) -> None:
    identifier = encoder.encode("a")
    assert woken.scheduler.ensure_cache_available(request_for("a"), 0)
    woken.wait()
    entry_path(folder, identifier).unlink()
    woken.step(request_for("a"))
    assert torch.equal(woken.encoder_cache[identifier], embedding_of("a"))
    assert woken.worker.stats.loads == 1


def test_an_entry_that_was_handed_over_arrives_again_when_it_is_wanted_again(encoder: Instance, woken: Woken) -> None:
    identifier = encoder.encode("a")
    woken.scheduler.ensure_cache_available(request_for("a"), 0)
    for _ in range(3):
        woken.scheduler.has_cache_item(identifier)
        woken.wait()
        woken.step(request_for("a"))
        assert woken.encoder_cache.pop(identifier).shape == (4, 64)


def test_a_damaged_entry_does_not_arrive_and_the_next_one_does(encoder: Instance, woken: Woken, folder: Path) -> None:
    path = entry_path(folder, encoder.encode("a"))
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([255 - int(embedding_of("a").view(torch.uint8).flatten()[-1])]))
    woken.scheduler.ensure_cache_available(request_for("a"), 0)
    Instance(config_for(folder, ECTransferRole.PRODUCER)).encode(
        "a"
    )  # it replaces what is damaged, unless that is gone
    woken.wait()
    woken.step(request_for("a"))
    assert torch.equal(woken.encoder_cache[identifier_of("a")], embedding_of("a"))


def test_what_is_not_needed_yet_comes_when_it_is_asked_for(encoder: Instance, woken: Woken) -> None:
    encoder.encode("a")
    request = request_for("a", "b")
    woken.scheduler.ensure_cache_available(request, 4)  # the prefix cache holds what a is for
    encoder.encode("b")
    woken.wait()
    assert not woken.scheduler.has_cache_item(identifier_of("a"))
    woken.wait()
    assert woken.scheduler.has_cache_item(identifier_of("a"))


def test_what_only_an_ended_request_wanted_is_let_go(encoder: Instance, woken: Woken) -> None:
    both = request_for("a", "b", request_id="both")
    one = request_for("b", request_id="one")
    for request in (both, one):
        woken.scheduler.ensure_cache_available(request, 0)
    for name in "ab":
        encoder.encode(name)
        woken.wait()
    woken.scheduler.request_finished(both)
    assert woken.scheduler.has_cache_item(identifier_of("b"))
    arrivals = woken.scheduler._arrivals  # type: ignore[attr-defined]
    assert arrivals.ready(identifier_of("a")) is None
    assert arrivals.ready(identifier_of("b")) is not None
    woken.scheduler.request_finished(one)
    woken.scheduler.request_finished(one)
    assert not len(arrivals._intake)
    assert not arrivals._lookout._awaited


def test_what_is_published_is_coming_and_what_is_not_is_awaited(encoder: Instance, woken: Woken, folder: Path) -> None:
    request = request_for("a")
    woken.scheduler.ensure_cache_available(request, 0)
    assert not woken.scheduler.is_coming(identifier_of("a"))
    path = entry_path(folder, encoder.encode("a"))
    assert woken.scheduler.is_coming(identifier_of("a"))
    woken.wait()
    path.unlink()
    assert woken.scheduler.is_coming(identifier_of("a"))  # it is in memory
    woken.step(request)
    assert not woken.scheduler.is_coming(identifier_of("a"))


# Bounds.


class Store:
    """Entries of one byte each, in memory."""

    def __init__(self, *, max_count: int) -> None:
        self.names: set[str] = set()
        self.news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.threads: set[str] = set()
        self.arrivals: Arrivals[str, str] = Arrivals(
            self._find, self._bring, lambda arrived="", /: self.news.put(None), max_bytes=100, max_count=max_count
        )

    def _find(self, name: str) -> tuple[str, int] | None:
        return (name, 1) if name in self.names else None

    def _bring(self, name: str, found: str) -> str:
        self.threads.add(threading.current_thread().name)
        return found

    def publish(self, names: list[str]) -> None:
        for name in names:
            self.names.add(name)

    def _ask(self, names: str) -> bool:
        first, *_ = [self.arrivals.ask(name) for name in names]
        return first

    def wait_for(self, names: str) -> None:
        """Ask for them in this order in each round, until the first is here; take it, and so on."""
        for position in range(len(names)):
            while not self._ask(names[position:]):
                self.arrivals.end_round()
                self.news.get(timeout=SECONDS)
            assert self.arrivals.take(names[position]) == names[position]
            self.arrivals.end_round()


def test_the_first_arrives_although_memory_is_full_of_others() -> None:
    store = Store(max_count=2)
    for name in "abcde":
        store.arrivals.want("request", name, 4, is_needed=True)
    store.names.update("abcd")
    for _ in range(2):
        store.news.get(timeout=SECONDS)
    store.names.add("e")
    store.wait_for("edcba")
    store.arrivals.stop()
    assert store.threads == {"chiasm-arrivals"}


def test_an_entry_that_cannot_be_read_costs_nobody_else() -> None:
    news: queue.SimpleQueue[None] = queue.SimpleQueue()

    def bring(name: str, found: str) -> str:
        if name == "bad":
            raise MemoryError
        return found

    arrivals = Arrivals(lambda name: (name, 1), bring, lambda arrived="", /: news.put(None), max_bytes=9, max_count=9)
    arrivals.want("one", "bad", 4, is_needed=True)
    arrivals.want("two", "good", 4, is_needed=True)
    news.get(timeout=SECONDS)
    assert (arrivals.ask("bad"), arrivals.ask("good")) == (False, True)
    arrivals.stop()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    order=st.permutations("abcdef"),
    published=st.permutations("abcdef"),
    max_count=st.integers(1, 3),
    finished=st.sets(st.sampled_from("abcdef")),
)
def test_in_any_order_of_events_all_that_is_wanted_arrives_and_nothing_is_kept(
    order: list[str], published: list[str], max_count: int, finished: set[str]
) -> None:
    store = Store(max_count=max_count)
    for name in order:
        store.arrivals.want(name, name, 4, is_needed=True)
    publisher = threading.Thread(target=store.publish, args=(published,))
    publisher.start()
    for name in finished:
        store.arrivals.finish(name, [name])
    store.wait_for("".join(name for name in order if name not in finished))
    for name in order:
        store.arrivals.finish(name, [name])
    publisher.join()
    assert not len(store.arrivals._intake)
    assert not store.arrivals._lookout._awaited
    store.arrivals.stop()
