"""How long what runs has to end: all the time in a drain, a limited time after a signal, none after a second one."""

from __future__ import annotations

import asyncio

from chiasm.http.shutdown import Shutdown


class Work:
    """Work that a test ends."""

    def __init__(self) -> None:
        self.is_done = False
        self.looked = asyncio.Semaphore(0)

    def __call__(self) -> bool:
        self.looked.release()
        return self.is_done


async def until_looked(work: Work, times: int = 2) -> None:
    for _ in range(times):
        await asyncio.wait_for(work.looked.acquire(), 10)


async def test_a_drain_gives_what_runs_all_the_time_that_it_needs() -> None:
    shutdown, work = Shutdown(0.0), Work()
    shutdown.drain()
    assert shutdown.is_asked
    draining = asyncio.create_task(shutdown.drained(work))
    await until_looked(work, 5)
    shutdown.drain()  # asked once more
    await until_looked(work, 5)
    assert not draining.done()
    work.is_done = True
    await asyncio.wait_for(draining, 10)


async def test_a_signal_limits_the_time_of_a_drain() -> None:
    shutdown, work = Shutdown(0.0), Work()
    shutdown.drain()
    draining = asyncio.create_task(shutdown.drained(work))
    await until_looked(work)
    shutdown.ask()
    await asyncio.wait_for(draining, 10)


async def test_a_second_signal_ends_the_time_at_once() -> None:
    shutdown, work = Shutdown(1000.0), Work()
    shutdown.ask()
    draining = asyncio.create_task(shutdown.drained(work))
    await until_looked(work)
    assert not draining.done()
    shutdown.drain()
    await until_looked(work)
    shutdown.ask()
    await asyncio.wait_for(draining, 10)


async def test_what_needs_no_more_than_a_given_time_gets_no_more() -> None:
    shutdown, work = Shutdown(1000.0), Work()
    shutdown.drain()
    await asyncio.wait_for(shutdown.drained(work, 0.0), 10)
