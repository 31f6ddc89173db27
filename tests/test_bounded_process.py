"""A process whose orders have limits of CPU time and memory."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from chiasm.bounded_process import BoundedProcess, ProcessEndedError

PROGRAM = """
import os
import time
from chiasm.bounded_process import carry_out_orders

def answer(order):
    match bytes(order):
        case b"spin":
            while True:
                pass
        case b"work":
            end = time.process_time() + 0.3
            while time.process_time() < end:
                pass
        case b"fill":
            try:
                return [b"%d" % len(bytes(4 << 30))]
            except MemoryError:
                return [b"no room"]
        case b"crash":
            os.abort()
    return [b"echo ", order]

carry_out_orders(answer, lambda order: 1 << 20)
"""


@pytest.fixture
def process() -> Iterator[BoundedProcess]:
    made = BoundedProcess("-c", PROGRAM)
    yield made
    made.end()


def test_one_process_answers_order_after_order(process: BoundedProcess) -> None:
    assert process.pid is None
    assert process.ask(b"a", b"b", cpu_seconds=1.0) == b"echo ab"
    first = process.pid
    large = bytes(8 << 20)
    assert process.ask(large, cpu_seconds=1.0) == b"echo " + large
    assert process.pid == first


def test_an_order_that_takes_too_long_ends_its_process_and_the_next_has_a_new_one(process: BoundedProcess) -> None:
    with pytest.raises(ProcessEndedError) as caught:
        process.ask(b"spin", cpu_seconds=0.1)
    assert caught.value.took_too_long
    assert process.pid is None
    assert process.ask(b"a", cpu_seconds=1.0) == b"echo a"


def test_a_crash_ends_its_order_only(process: BoundedProcess) -> None:
    with pytest.raises(ProcessEndedError) as caught:
        process.ask(b"crash", cpu_seconds=1.0)
    assert not caught.value.took_too_long
    assert process.ask(b"a", cpu_seconds=1.0) == b"echo a"


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is limited on Linux only")
def test_an_order_gets_no_more_memory_than_it_may_have(process: BoundedProcess) -> None:
    assert process.ask(b"fill", cpu_seconds=1.0) == b"no room"


def test_a_process_that_was_killed_meanwhile_costs_no_order(process: BoundedProcess) -> None:
    process.ask(b"a", cpu_seconds=1.0)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert process.ask(b"a", cpu_seconds=1.0) == b"echo a"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_asks_all_processes_of_a_service_to_end_costs_no_order(
    process: BoundedProcess, number: signal.Signals
) -> None:
    process.ask(b"a", cpu_seconds=1.0)
    pid = process.pid
    assert pid is not None
    os.kill(pid, number)
    assert process.ask(b"a", cpu_seconds=1.0) == b"echo a"
    assert process.pid == pid


def test_cpu_time_of_earlier_orders_does_not_count(process: BoundedProcess) -> None:
    for _ in range(5):
        assert process.ask(b"work", cpu_seconds=0.5) == b"echo work"


def test_ending_is_idempotent_and_leaves_no_process(process: BoundedProcess) -> None:
    process.ask(b"a", cpu_seconds=1.0)
    pid = process.pid
    assert pid is not None
    process.end()
    process.end()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
