"""Overload: every request gets an answer."""

from __future__ import annotations

import asyncio

import pytest

from .conftest import Images, Start, ask, image, image_bytes, listen
from .instances import (
    Answering,
    FakeInstance,
    after,
    chat,
    encode,
    interrupted_by,
    refuse,
)


async def test_two_hundred_requests_are_all_answered(start: Start) -> None:
    pd, gate = FakeInstance("pd"), asyncio.Event()

    pd.answer = after(gate, chat)
    front = await start([pd], max_concurrent_requests=50)
    requests = [asyncio.ensure_future(front.post(ask("x"))) for _ in range(200)]
    refused = 'chiasm_proxy_requests_total{route="/v1/chat/completions",status="503"}'
    while await front.metric(refused) + len(pd.received) < 200:
        pass
    gate.set()
    answers = await asyncio.gather(*requests)
    statuses = [answer.status for answer in answers]
    assert statuses.count(200) == 50
    assert statuses.count(503) == 150
    for answer in answers:
        if answer.status == 503:
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.error["code"] == "too_many_requests"
    assert (await front.post(ask("x"))).status == 200


async def test_buffered_bytes_are_bounded_over_all_requests(start: Start) -> None:
    pd, gate = FakeInstance("pd"), asyncio.Event()

    pd.answer = after(gate, chat)
    front = await start([pd], max_buffered_bytes=150_000)
    first = asyncio.ensure_future(front.post(ask("x" * 100_000)))
    await pd.arrived.acquire()
    refused = await front.post(ask("x" * 100_000))
    assert refused.status == 503
    assert "Retry-After" in refused.headers
    gate.set()
    assert (await first).status == 200
    assert (await front.post(ask("x" * 100_000))).status == 200


async def test_fetched_media_counts_as_buffered(start: Start, images: Images) -> None:
    front = await start([FakeInstance("encoder"), FakeInstance("pd")], max_buffered_bytes=10_000)
    url = await images(image_bytes(size=(2000, 900), format="BMP"))
    assert (await front.post(ask(image(url)))).status == 503
    assert front.service.admission.held_bytes == 0


@pytest.mark.parametrize("outcome", [encode, refuse(400, "no image")], ids=["encoded", "refused"])
async def test_images_that_encoders_still_have_when_a_stream_begins_are_buffered_until_those_have_answered(
    start: Start, outcome: Answering
) -> None:
    encoder, pd, has_begun, is_freed = FakeInstance("encoder"), FakeInstance("pd"), asyncio.Event(), asyncio.Event()
    pd.answer, encoder.answer = interrupted_by(is_freed), after(has_begun, outcome)
    front = await start([encoder, pd])
    stream = asyncio.ensure_future(listen(front, ask(image(image_bytes()), stream=True), {1: has_begun}))
    await has_begun.wait()
    async with asyncio.timeout(30):
        while front.service.admission.held_bytes:
            await front.get("/health")
    is_freed.set()
    assert (await stream).ended
