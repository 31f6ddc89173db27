"""When requests are sent: at random times, so many at once, in turns, or while streams run."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from chiasm.bench.client import RequestFailedError, StreamedAnswer
from chiasm.bench.measurement import Bench
from chiasm.bench.requests import stream
from chiasm.bench.statistics import median
from chiasm.tasks import end_tasks

_T = TypeVar("_T")


def poisson(seed: int, rate_per_second: float, seconds: float) -> list[float]:
    """Return times of arrival in seconds from the start, independent of each other; the same seed gives the same times."""
    if rate_per_second <= 0:
        raise ValueError("the rate of arrivals must be above 0")
    generator = random.Random(seed)
    times: list[float] = []
    now = generator.expovariate(rate_per_second)
    while now < seconds:
        times.append(now)
        now += generator.expovariate(rate_per_second)
    return times


async def open_loop(times: Sequence[float], send: Callable[[int], Awaitable[_T]]) -> list[_T]:
    """Call ``send`` with 0, 1, … at ``times``, without waiting for earlier calls, and return the results.

    The first call that raises ends the others.
    """
    started = time.perf_counter()

    async def at(index: int, due: float) -> _T:
        await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
        return await send(index)

    return await _all([at(index, due) for index, due in enumerate(times)])


async def at_most(number: int, count: int, send: Callable[[int], Awaitable[_T]]) -> list[_T]:
    """Call ``send`` with 0 … ``count`` - 1, ``number`` of them at a time, and return the results in order.

    The first call that raises ends the others.
    """
    turn = asyncio.Semaphore(number)

    async def one(index: int) -> _T:
        async with turn:
            return await send(index)

    return await _all([one(index) for index in range(count)])


async def _all(work: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Return the results in order. Raises the first failure itself, not an exception group as a TaskGroup does."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


def turns(index: int, number: int) -> list[int]:
    """Return 0 … ``number`` - 1 in the order of round ``index``: each is first in one round of ``number``."""
    return [(index + place) % number for place in range(number)]


def alternate(actions: Sequence[Callable[[], tuple[float, ...]]], repeats: int) -> list[float]:
    """Call actions in turns, and return the medians of the numbers that each returns, in order.

    There are ``repeats`` rounds after one that doesn't count. Every other round is in reverse order, so that the state of
    caches and other load affect all actions alike.
    """
    found: list[list[tuple[float, ...]]] = [[] for _ in actions]
    order = list(range(len(actions)))
    for _ in range(repeats + 1):
        for which in order:
            found[which].append(actions[which]())
        order.reverse()
    return [median(values) for rounds in found for values in zip(*rounds[1:], strict=True)]


async def stream_in_turns(
    bench: Bench, urls: Sequence[str], body_of: Callable[[int], bytes], *, rounds: int, warm_up: int
) -> list[list[StreamedAnswer]]:
    """Send one request a round to each server, one after the other, and return the answers of each server.

    ``body_of`` gives the body of a round; those of the ``warm_up`` rounds before the first are negative.
    """
    found: list[list[StreamedAnswer]] = [[] for _ in urls]
    for index in range(-warm_up, rounds):
        body = body_of(index)
        for which in turns(index, len(urls)):
            answer = await bench.client.chat(urls[which], body)
            if index >= 0:
                found[which].append(answer)
        bench.advance()
    return found


async def gaps_meanwhile(
    bench: Bench, url: str, texts: Sequence[str], meanwhile: Callable[[], Awaitable[object]], *, max_tokens: int
) -> list[float]:
    """Run one stream per text, all at once, until ``meanwhile`` is over, and return the seconds between their tokens.

    ``meanwhile`` begins when each stream has its first token. A stream that has reached ``max_tokens`` is started again.
    Gaps are between tokens of one stream. Raises RequestFailedError.
    """
    found: list[float] = []
    begun = [asyncio.Event() for _ in texts]

    async def run(text: str, first: asyncio.Event) -> None:
        while True:
            async with aclosing(bench.client.follow(url, stream(text, max_tokens))) as answers:
                before = None
                async for answer in answers:
                    for moment in answer.token_times:
                        if before is not None:
                            found.append(moment - before)
                        before = moment
                        first.set()
                    answer.token_times.clear()

    async def all_begun() -> None:
        for first in begun:
            await first.wait()

    streams = [asyncio.create_task(run(text, first)) for text, first in zip(texts, begun, strict=True)]
    waiting = asyncio.create_task(all_begun())
    try:
        await asyncio.wait((*streams, waiting), return_when=asyncio.FIRST_COMPLETED)
        begun_at = time.perf_counter()
        found.clear()
        if waiting.done():
            await meanwhile()
        for one in streams:
            if one.done():
                one.result()
                raise RequestFailedError(f"A stream of {url} ended after {time.perf_counter() - begun_at:.1f} s.")
    finally:
        await end_tasks(waiting, *streams)
    return found
