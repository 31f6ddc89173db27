"""Questions that wait until an embedding is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future

import pytest

from chiasm.ec_transfer.losses import MAX_ASKERS, LossWatch

A, B, C = "a" * 64, "b" * 64, "c" * 64
SECONDS = 60


class Connector:
    """What of the embeddings is not coming, as a test says."""

    def __init__(self) -> None:
        self.gone: set[str] = set()
        self.looks = 0
        self.has_looked = threading.Semaphore(0)

    def not_coming(self, names: Iterable[str]) -> list[str]:
        self.looks += 1
        self.has_looked.release()
        return [name for name in names if name in self.gone]


@pytest.fixture
def connector() -> Connector:
    return Connector()


@pytest.fixture
def watch(connector: Connector) -> Iterator[LossWatch]:
    watch = LossWatch(connector.not_coming)
    yield watch
    watch.stop()


def ended(told: Future[list[str]]) -> bool:
    return told.done() and told.result() == []


def test_what_is_missing_and_not_coming_is_told(watch: LossWatch, connector: Connector) -> None:
    connector.gone = {A, C}
    told = watch.ask("proxy", [A, B])
    watch.note_missing([A, B, C])
    assert told.result(SECONDS) == [A]  # nobody has published c, and b is coming
    assert not watch.is_asked


def test_a_question_waits_until_something_is_lost(watch: LossWatch, connector: Connector) -> None:
    told = watch.ask("proxy", [A])
    watch.note_missing([A])
    for _ in range(3):
        assert connector.has_looked.acquire(timeout=SECONDS)
    assert not told.done()
    connector.gone = {A}
    assert told.result(SECONDS) == [A]


def test_a_question_waits_until_what_is_gone_is_wanted(watch: LossWatch, connector: Connector) -> None:
    connector.gone = {A}
    told = watch.ask("proxy", [A])
    watch.note_missing([])
    assert not told.done()
    watch.note_missing([A])
    assert told.result(SECONDS) == [A]


def test_what_nobody_asks_about_is_not_looked_for(watch: LossWatch, connector: Connector) -> None:
    connector.gone = {B}
    watch.note_missing([A, B])
    told = watch.ask("proxy", [A])
    watch.note_missing([B])
    assert connector.looks == 0
    assert not told.done()


def test_what_was_missing_when_nobody_asked_does_not_count(watch: LossWatch, connector: Connector) -> None:
    connector.gone = {A}
    watch.note_missing([A])
    told = watch.ask("proxy", [A])
    assert connector.looks == 0
    watch.note_missing([])
    assert not told.done()


def test_the_next_question_of_an_asker_ends_the_one_before(watch: LossWatch, connector: Connector) -> None:
    first, second = watch.ask("proxy", [A]), watch.ask("proxy", [A, B])
    assert ended(first)
    connector.gone = {A}
    watch.note_missing([A])
    assert second.result(SECONDS) == [A]


def test_a_question_about_nothing_ends_the_one_before(watch: LossWatch) -> None:
    first = watch.ask("proxy", [A])
    assert ended(watch.ask("proxy", []))
    assert ended(first)
    assert not watch.is_asked


def test_two_proxies_are_told_what_each_has_published(watch: LossWatch, connector: Connector) -> None:
    first, second, third = watch.ask("one", [A, B]), watch.ask("another", [A]), watch.ask("a third", [C])
    connector.gone = {A}
    watch.note_missing([A, B, C])
    assert (first.result(SECONDS), second.result(SECONDS)) == ([A], [A])
    assert not third.done()


def test_what_is_lost_twice_is_told_twice(watch: LossWatch, connector: Connector) -> None:
    connector.gone = {A}
    for _ in range(2):
        told = watch.ask("proxy", [A])
        watch.note_missing([A])
        assert told.result(SECONDS) == [A]


def test_of_too_many_questions_the_oldest_ends(watch: LossWatch) -> None:
    first, *others = [watch.ask(f"proxy {number}", [A]) for number in range(MAX_ASKERS + 1)]
    assert ended(first)
    assert not any(told.done() for told in others)


def test_a_question_that_is_cancelled_is_forgotten(watch: LossWatch, connector: Connector) -> None:
    told = watch.ask("proxy", [A])
    watch.note_missing([A])
    told.cancel()
    assert not watch.is_asked
    connector.gone = {A}
    again = watch.ask("proxy", [A])
    watch.note_missing([A])
    assert again.result(SECONDS) == [A]


def test_what_waits_ends_with_the_watch_and_nothing_waits_after_it(watch: LossWatch) -> None:
    first = watch.ask("proxy", [A])
    watch.note_missing([A])
    watch.stop()
    assert ended(first)
    assert ended(watch.ask("proxy", [A]))


def test_questions_and_answers_from_many_threads_leave_none_waiting(watch: LossWatch, connector: Connector) -> None:
    connector.gone = {A}
    told: list[Future[list[str]]] = []

    def ask(asker: str) -> None:
        for _ in range(200):
            told.append(watch.ask(asker, [A]))
            watch.note_missing([A])

    threads = [threading.Thread(target=ask, args=(f"proxy {number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {tuple(one.result(SECONDS)) for one in told} <= {(), (A,)}
