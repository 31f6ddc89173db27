"""What came of an estimate: requests' records have it, and a metric has the measured time over it."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from chiasm.http.timing import TimingEntry, write_timing
from chiasm.wire import Costs, ImageCost

from .conftest import Front, Start, ask, image, image_bytes
from .instances import FakeInstance, Received, chat

PER_TOKEN = 0.001
ENCODE = 0.5
TTFT = 3.0
IMAGES = [ImageCost(pixels=64, tokens=100, encode_seconds=ENCODE)]


async def chat_with_ttft(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
    answer = await chat(instance, request, received)
    answer.headers["Server-Timing"] = write_timing([TimingEntry("ttft", TTFT)])
    return answer


def fleet() -> list[FakeInstance]:
    pd = FakeInstance("pd", costs=Costs(prefill_seconds_per_token=PER_TOKEN, images=IMAGES))
    pd.answer = chat_with_ttft
    return [FakeInstance("encoder", costs=Costs(images=IMAGES)), pd]


async def ratios(front: Front, what: str, *, at_least: int = 0) -> tuple[float, float]:
    """The number of outcomes of this kind, when there are as many, and the sum of their ratios."""
    name, label = "chiasm_proxy_estimate_ratio", f'{{what="{what}"}}'
    async with asyncio.timeout(60):
        while (count := await front.metric(f"{name}_count{label}")) < at_least:
            pass  # each look takes a turn of its own
    return count, await front.metric(f"{name}_sum{label}")


async def test_a_record_has_the_estimate_and_the_metric_what_came_of_it(start: Start) -> None:
    front = await start(fleet())
    body = ask("how many?")
    await front.post(body, **{"X-Request-Id": "text"})
    estimate = (await front.record("text"))["stages"]["estimate"]
    assert 16 * PER_TOKEN < estimate < (16 + len(str(body))) * PER_TOKEN
    count, total = await ratios(front, "first_token")
    assert count == 1
    assert total == pytest.approx(TTFT / estimate, rel=1e-3)
    assert (await ratios(front, "embedding"))[0] == 0


async def test_the_estimate_of_an_image_has_its_outcome_too(start: Start) -> None:
    front = await start(fleet())
    await front.post(ask(image(image_bytes())), **{"X-Request-Id": "one"})
    estimate = (await front.record("one"))["stages"]["estimate"]
    assert estimate > ENCODE + 100 * PER_TOKEN
    assert (await ratios(front, "first_token"))[1] == pytest.approx(TTFT / estimate, rel=1e-3)
    count, total = await ratios(front, "embedding", at_least=1)
    assert count == 1
    assert total > 0
