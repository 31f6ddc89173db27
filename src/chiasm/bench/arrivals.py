"""Requests that come when they come, however long the answers take."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

_T = TypeVar("_T")


def poisson(seed: int, rate_per_second: float, seconds: float) -> list[float]:
    """Seconds from the start at which requests arrive, independently of each other; the same for the same seed."""
    if rate_per_second <= 0:
        raise ValueError("requests arrive at a rate above 0 a second")
    generator = random.Random(seed)
    times: list[float] = []
    now = generator.expovariate(rate_per_second)
    while now < seconds:
        times.append(now)
        now += generator.expovariate(rate_per_second)
    return times


async def open_loop(times: Sequence[float], send: Callable[[int], Awaitable[_T]]) -> list[_T]:
    """Call ``send`` with 0, 1, … at ``times``, whether or not those before have answered; returns what came of each.

    The first that raises ends the others.
    """
    started = time.perf_counter()

    async def at(index: int, due: float) -> _T:
        await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
        return await send(index)

    return await _all([at(index, due) for index, due in enumerate(times)])


async def at_most(number: int, count: int, send: Callable[[int], Awaitable[_T]]) -> list[_T]:
    """Call ``send`` with 0 … ``count`` - 1, ``number`` of them at a time; returns what came of each, in order.

    The first that raises ends the others.
    """
    turn = asyncio.Semaphore(number)

    async def one(index: int) -> _T:
        async with turn:
            return await send(index)

    return await _all([one(index) for index in range(count)])


async def _all(work: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """What came of each, in order. Raises what the first raises, and not a group of it, as a TaskGroup does."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]
