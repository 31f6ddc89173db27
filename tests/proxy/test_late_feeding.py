"""Images wait in the proxy, and encoders get them when they have room."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest
from aiohttp import web

from chiasm.proxy import encoders
from chiasm.tasks import end_tasks

from .conftest import GIVES_UP_SECONDS, Front, Start, ask, image, image_bytes, until_idle, when_encoded
from .instances import FakeInstance, Received, after, chat, encode, never, refuse

SIZE = (600, 400)
"""Large enough that two of them are enough work for an encoder."""
full_encoder = refuse(503, "The queue is full.", kind="overloaded_error", code="too_many_requests")
COLOURS = ("red", "green", "blue", "white", "black")


async def waiting(front: Front, count: int) -> None:
    """Return when this many images wait for an encoder with room."""
    async with asyncio.timeout(60):
        while await front.metric("chiasm_proxy_items_waiting") != count:
            pass


async def test_an_encoder_gets_no_more_than_two_images_and_the_rest_when_it_has_answered(start: Start) -> None:
    encoder, pd, gate = FakeInstance("encoder"), FakeInstance("pd"), asyncio.Event()

    encoder.answer = after(gate, encode)
    front = await start([encoder, pd])
    pd.answer = when_encoded(front, chat, len(COLOURS))
    request = asyncio.ensure_future(front.post(ask(*(image(image_bytes(one, SIZE)) for one in COLOURS))))
    await waiting(front, len(COLOURS) - 2)
    await asyncio.wait_for(encoder.arrived.acquire(), 60)
    assert [len(received.identifiers) for received in encoder.received] == [2]
    gate.set()
    assert (await request).status == 200
    assert [len(received.identifiers) for received in encoder.received] == [2, 2, 1]
    sent = [name for received in encoder.received for name in received.identifiers]
    assert sent == pd.received[0].identifiers
    await until_idle(front)


async def test_images_that_wait_are_given_up_when_their_client_leaves(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    encoder.answer = pd.answer = never
    front = await start([encoder, pd])
    request = asyncio.ensure_future(front.post(ask(*(image(image_bytes(one, SIZE)) for one in COLOURS))))
    await waiting(front, len(COLOURS) - 2)
    request.cancel()
    await waiting(front, 0)
    await until_idle(front)


async def test_images_wait_for_a_full_encoder(start: Start) -> None:
    """Being full isn't a failure: the attempts of an image aren't used up."""
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")

    async def full_at_first(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        answer = encode if len(encoder.received) > 3 else full_encoder
        return await answer(instance, request, received)

    encoder.answer = full_at_first
    front = await start([encoder, pd], max_encode_attempts=1)
    pd.answer = when_encoded(front, chat)
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert len(encoder.received) == 4
    assert await front.metric("chiasm_proxy_encode_refusals_total") == 3
    assert await front.metric("chiasm_proxy_encode_retries_total") == 0


@pytest.mark.usefixtures("giving_up_early")
async def test_waiting_for_a_full_encoder_ends_at_the_deadline(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    encoder.answer, pd.answer = full_encoder, never
    front = await start([encoder, pd], deadline_seconds=GIVES_UP_SECONDS)
    answer = await front.post(ask(image(image_bytes())))
    assert (answer.status, answer.error["code"]) == (503, "too_many_requests")
    await until_idle(front)


async def test_images_that_wait_fail_when_the_last_encoder_is_gone(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    encoder.answer = pd.answer = never
    front = await start([encoder, pd])
    request = asyncio.ensure_future(front.post(ask(*(image(image_bytes(one, SIZE)) for one in COLOURS))))
    await waiting(front, len(COLOURS) - 2)
    await encoder.kill()
    answer = await request
    assert answer.status == 503
    assert answer.error["code"] in {"encoder_lost", "no_encoder"}
    await until_idle(front)


async def test_an_encoder_that_is_added_gets_images_that_wait(start: Start) -> None:
    stuck, pd, other = FakeInstance("encoder"), FakeInstance("pd"), FakeInstance("encoder")
    stuck.answer = pd.answer = never
    front = await start([stuck, pd], admin_key="k" * 16)
    request = asyncio.ensure_future(front.post(ask(*(image(image_bytes(one, SIZE)) for one in COLOURS[:3]))))
    await waiting(front, 1)
    await other.start()
    key = {"Authorization": "Bearer " + "k" * 16}
    assert (await front.post({"url": other.url, "role": "encoder"}, "/instances", **key)).status == 201
    await asyncio.wait_for(other.arrived.acquire(), 60)
    await end_tasks(request)
    await other.kill()


async def test_images_that_found_no_room_while_the_last_encoder_was_back_wait_as_long_when_it_is_lost_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, pd, later_seconds = FakeInstance("encoder"), FakeInstance("pd"), 0.0
    monkeypatch.setattr(encoders, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + later_seconds))
    encoder.answer = never
    front = await start([encoder, pd], wait_for_instance_seconds=1000.0)
    pd.answer = when_encoded(front, chat, 3)
    request = asyncio.ensure_future(front.post(ask(*(image(image_bytes(one, SIZE)) for one in COLOURS[:3]))))
    await waiting(front, 1)
    await asyncio.wait_for(encoder.arrived.acquire(), 60)
    await encoder.kill()
    await waiting(front, 3)
    await encoder.start()
    await waiting(front, 1)
    await asyncio.wait_for(encoder.arrived.acquire(), 60)
    later_seconds = 2000.0
    await encoder.kill()
    await waiting(front, 3)
    encoder.answer = encode
    await encoder.start()
    assert (await request).status == 200
