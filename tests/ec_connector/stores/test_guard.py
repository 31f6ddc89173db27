"""A store that has failed is left alone for a while."""

from __future__ import annotations

import logging

import pytest

from chiasm.ec_transfer.stores import AbsentEntryError, Guard, StoreError
from chiasm.ec_transfer.stores.guard import PausedError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def guard(clock: Clock) -> Guard:
    return Guard("Reading", clock)


def fail(guard: Guard) -> None:
    with pytest.raises(StoreError, match="down"), guard.use():
        raise StoreError("down")


def test_nothing_goes_through_after_a_fault_and_each_pause_is_longer(guard: Guard, clock: Clock) -> None:
    for seconds in (1, 2, 4, 8, 16, 30, 30):
        fail(guard)
        clock.now += seconds - 0.01
        assert not guard.is_open
        with pytest.raises(PausedError), guard.use():
            raise AssertionError
        clock.now += 0.01
        assert guard.is_open
    assert guard.faults == 7


def test_one_tries_while_the_others_are_turned_away(guard: Guard, clock: Clock) -> None:
    fail(guard)
    clock.now += 1
    with guard.use():
        assert not guard.is_open
        with pytest.raises(PausedError), guard.use():
            raise AssertionError
    assert guard.is_open
    with guard.use():
        pass


def test_a_miss_is_no_fault_and_ends_one(guard: Guard, clock: Clock) -> None:
    fail(guard)
    clock.now += 1
    with pytest.raises(AbsentEntryError), guard.use():
        raise AbsentEntryError
    assert guard.is_open
    assert guard.faults == 1


def test_uses_that_fail_together_are_one_pause(guard: Guard, clock: Clock) -> None:
    uses = [guard.use(), guard.use()]
    for use in uses:
        use.__enter__()
    for use in uses:
        use.__exit__(StoreError, StoreError("down"), None)
    assert guard.faults == 2
    clock.now += 1
    assert guard.is_open


def test_faults_are_logged_when_they_begin_and_end(
    guard: Guard, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "chiasm")
    for _ in range(3):
        fail(guard)
        clock.now += 60
    with guard.use():
        pass
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
