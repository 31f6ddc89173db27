"""Text streams that run for as long as something else goes on, and the gaps between their tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing

from chiasm.bench import prompts
from chiasm.bench.client import RequestFailedError
from chiasm.bench.measurement import Bench


async def gaps_meanwhile(
    bench: Bench, url: str, texts: Sequence[str], meanwhile: Callable[[], Awaitable[object]], *, max_tokens: int
) -> list[float]:
    """Seconds between the tokens of one stream a text, all at once, until ``meanwhile`` is over.

    Each has its first token before ``meanwhile`` begins, and is begun anew whenever it has ``max_tokens``. Gaps are those
    within a stream. Raises RequestFailedError.
    """
    found: list[float] = []
    begun = [asyncio.Event() for _ in texts]

    async def stream(text: str, first: asyncio.Event) -> None:
        while True:
            async with aclosing(bench.client.follow(url, prompts.stream(text, max_tokens))) as answers:
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

    streams = [asyncio.create_task(stream(text, first)) for text, first in zip(texts, begun, strict=True)]
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
                raise RequestFailedError(f"a stream of {url} ended after {time.perf_counter() - begun_at:.1f} s")
    finally:
        for task in (waiting, *streams):
            task.cancel()
        await asyncio.gather(waiting, *streams, return_exceptions=True)
    return found
