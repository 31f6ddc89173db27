"""One trial: prepares the requests of a pattern, sends them in an open loop, and gives up those that are far too late."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from chiasm.bench.client import RequestFailedError, StreamedAnswer
from chiasm.bench.goodput import Limits, Served, Trial, Verdict, judge
from chiasm.bench.load import open_loop
from chiasm.bench.measurement import Bench
from chiasm.bench.requests import Texts, image_part, photo, stream, text_part
from chiasm.bench.traffic import PATIENCE, Arrival

_REFUSED = (429, 503)
_DRAIN_SECONDS = 20.0
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Prepared:
    """One request, ready to be sent."""

    time: float
    """When it arrives, in seconds at one request per second."""
    size_class: str
    answer_tokens: int
    body: bytes


def prepare(texts: Texts, arrivals: Sequence[Arrival], name: str) -> list[Prepared]:
    """Return requests whose images and texts are new for each ``name``; it takes milliseconds for each image."""
    prepared = []
    for number, arrival in enumerate(arrivals):
        shape = arrival.shape
        ids = shape.image_ids or tuple(f"{number} {place}" for place in range(len(shape.images)))
        files = [photo(f"{name} {one}", width, height) for one, (width, height) in zip(ids, shape.images, strict=True)]
        parts = [*map(image_part, files), text_part(texts.long(shape.prompt_tokens))]
        body = stream(parts, shape.answer_tokens)
        prepared.append(Prepared(arrival.time, shape.size_class, shape.answer_tokens, body))
    return prepared


async def play(
    bench: Bench, url: str, requests: Sequence[Prepared], *, rate: float, seed: int, limits: Mapping[str, Limits]
) -> Trial:
    """Send requests at ``rate`` per second, and return when nothing of them is left in the deployment.

    Raises RequestFailedError if something is left for too long.
    """
    started = time.perf_counter()
    due = [request.time / rate for request in requests]

    async def send(index: int) -> Served:
        request = requests[index]
        return await _serve(bench, url, request, started + due[index], limits[request.size_class])

    served = await open_loop(due, send)
    await drain(bench, url)
    return Trial(rate, seed, served)


async def _serve(bench: Bench, url: str, request: Prepared, due: float, limits: Limits) -> Served:
    """Send one request and judge it. Its time counts from when it was due, also if the client was late itself."""
    clock = asyncio.get_running_loop()
    answer = StreamedAnswer(due)
    later_tokens = request.answer_tokens - 1
    try:
        async with (
            asyncio.timeout(PATIENCE * limits.ttft_seconds) as patience,
            aclosing(bench.client.follow(url, request.body)) as answers,
        ):
            waiting = True
            async for answer in answers:
                if waiting and answer.token_times:
                    waiting = False
                    patience.reschedule(clock.time() + PATIENCE * limits.tpot_seconds * max(1, later_tokens))
    except TimeoutError:
        if not answer.token_times:
            return Served(request.size_class, Verdict.LATE)
        ttft = answer.token_times[0] - due
        return Served(request.size_class, judge(limits, ttft, math.inf), ttft)
    except RequestFailedError as error:
        refused = error.http_status in _REFUSED
        return Served(request.size_class, Verdict.REFUSED if refused else Verdict.FAILED)
    if not answer.token_times:
        return Served(request.size_class, Verdict.FAILED)
    ttft = answer.token_times[0] - due
    tpot = (answer.token_times[-1] - answer.token_times[0]) / later_tokens if later_tokens else None
    return Served(request.size_class, judge(limits, ttft, tpot), ttft, tpot)


async def drain(bench: Bench, url: str) -> None:
    """Wait until no instance has a request of the proxy. Raises RequestFailedError if one still has after 20 seconds."""
    busy = [url]
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            while True:
                health = await bench.client.proxy_health(url)
                if not (busy := [one.url for one in health.instances if one.in_flight]):
                    return
                await asyncio.sleep(_POLL_SECONDS)
    except TimeoutError:
        raise RequestFailedError(
            f"{busy[0]} still works {_DRAIN_SECONDS:g} s after the last request has ended, or doesn't answer."
        ) from None
