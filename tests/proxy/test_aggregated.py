"""Aggregated instances: they get images as bytes, never as a URL to fetch."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web

from chiasm.media import identifier
from chiasm.proxy.job import Original
from chiasm.proxy.media import Item
from chiasm.tasks import end_tasks
from chiasm.wire import Costs, ImageCost

from .conftest import Images, Start, ask, data_url, image, image_bytes, listen, until_idle
from .instances import (
    FINGERPRINT,
    Answering,
    FakeInstance,
    Received,
    after,
    begin_stream,
    chat,
    encode,
    event,
    full,
    lose,
    never,
    once,
    refuse,
)

stopping = refuse(503, "This instance is shutting down.", kind="overloaded_error", code="stopping")


async def test_bodies_with_data_urls_pass_unchanged(start: Start) -> None:
    aggregated = FakeInstance("aggregated")
    front = await start([aggregated])
    url = data_url(image_bytes()).encode()
    text = b'{"messages": [{"role":"user","content":"x"}], "model":"tiny" }'
    media = b'{"messages": [{"content":[ {"type":"image_url", "image_url":{"url":"%b"}} ]}] }' % url
    for body in (text, media):
        assert (await front.post(body)).status == 200
        assert aggregated.received[-1].body == body


async def test_base64_that_not_every_server_reads_is_rewritten(start: Start) -> None:
    aggregated = FakeInstance("aggregated")
    front = await start([aggregated])
    head, _, text = data_url(image_bytes()).partition(",")
    assert (
        await front.post(ask(image(f"{head},{text[:8]}\n{text[8:].rstrip('=')}"), image(image_bytes("red"))))
    ).status == 200
    name = identifier(image_bytes(), fingerprint=FINGERPRINT)
    assert aggregated.received[0].json == ask(image(image_bytes(), uuid=name), image(image_bytes("red")))


async def test_urls_are_fetched_by_the_proxy(start: Start, images: Images) -> None:
    aggregated = FakeInstance("aggregated")
    front = await start([aggregated])
    url = await images(image_bytes("blue"))
    own = image(image_bytes("red"))
    assert (await front.post(ask("x", own, image(url), temperature=0.5))).status == 200
    name = identifier(image_bytes("blue"), fingerprint=FINGERPRINT)
    assert aggregated.received[0].json == ask("x", own, image(image_bytes("blue"), uuid=name), temperature=0.5)


async def test_a_clients_uuid_is_not_passed_on(start: Start) -> None:
    aggregated = FakeInstance("aggregated")
    front = await start([aggregated])
    assert (await front.post(ask(image(image_bytes(), uuid="a" * 64)))).status == 200
    assert aggregated.received[0].identifiers == [identifier(image_bytes(), fingerprint=FINGERPRINT)]


async def test_the_guarded_fetcher_is_used_for_aggregated_instances_too(start: Start) -> None:
    aggregated = FakeInstance("aggregated")
    front = await start([aggregated])
    assert (await front.post(ask(image("http://169.254.169.254/")))).error["code"] == "media_address_not_allowed"
    assert (await front.post(ask(image(b"no image")))).error["code"] == "invalid_image"
    assert not aggregated.received


async def test_a_mixed_fleet_uses_the_side_with_less_to_do(start: Start) -> None:
    # So slow that nothing counts as done before it is answered, however slow the machine is.
    costs = Costs(
        prefill_seconds_per_token=10.0,
        decode_step_seconds=10.0,
        images=[ImageCost(pixels=20, tokens=100, encode_seconds=10.0)],
    )
    encoder, pd, aggregated = (FakeInstance(role, costs=costs) for role in ("encoder", "pd", "aggregated"))
    gate = asyncio.Event()

    pd.answer = aggregated.answer = after(gate, chat)
    front = await start([encoder, pd, aggregated])
    requests = []
    bodies = [ask("x", image(image_bytes(size=(5, n)))) for n in range(1, 5)] + [ask("x")] * 4
    for count, body in enumerate(bodies, 1):
        requests.append(asyncio.ensure_future(front.post(body)))
        while len(pd.received) + len(aggregated.received) < count:
            await front.get("/health")
    gate.set()
    assert {answer.status for answer in await asyncio.gather(*requests)} == {200}
    assert min(len(pd.received), len(aggregated.received)) >= 3
    types = {part["type"] for received in aggregated.received for part in received.parts}
    assert "image_embeds" not in types
    assert all(part["type"] != "image_url" for received in pd.received for part in received.parts)


async def test_an_image_goes_to_no_instance_of_another_role_when_its_own_is_full(start: Start) -> None:
    encoder, pd, aggregated = (FakeInstance(role) for role in ("encoder", "pd", "aggregated"))
    for one in (pd, aggregated):
        once(full, chat, one)
    front = await start([encoder, pd, aggregated])
    for height in (4, 5):
        assert (await front.post(ask("x", image(image_bytes(size=(6, height)))))).status == 200
    assert await front.metric("chiasm_proxy_language_refusals_total") >= 1
    assert all(part["type"] != "image_url" for received in pd.received for part in received.parts)
    assert all(part["type"] != "image_embeds" for received in aggregated.received for part in received.parts)


async def test_images_go_to_aggregated_instances_if_there_are_no_encoders(start: Start) -> None:
    pd, aggregated = FakeInstance("pd"), FakeInstance("aggregated")
    front = await start([pd, aggregated])
    for n in range(1, 4):
        assert (await front.post(ask(image(image_bytes(size=(5, n)))))).status == 200
    assert not pd.received
    assert len(aggregated.received) == 3


async def test_images_go_to_aggregated_instances_once_the_last_encoder_is_gone(start: Start) -> None:
    encoder, pd, aggregated = FakeInstance("encoder"), FakeInstance("pd"), FakeInstance("aggregated")
    front = await start([encoder, pd, aggregated])
    for n in range(1, 4):
        assert (await front.post(ask(image(image_bytes(size=(5, n)))))).status == 200
    await encoder.kill()
    await front.until(encoder, "unhealthy")
    before = len(aggregated.received), len(pd.received)
    for n in range(1, 4):
        assert (await front.post(ask(image(image_bytes(size=(5, n)))))).status == 200
    assert (len(aggregated.received), len(pd.received)) == (before[0] + 3, before[1])


@pytest.mark.parametrize("takes_image_size", [True, False], ids=["pd was called", "pd was not called"])
async def test_images_that_wait_go_to_an_aggregated_instance_when_the_last_encoder_is_gone(
    start: Start, images: Images, takes_image_size: bool
) -> None:
    encoder, pd, aggregated = stuck_fleet(takes_image_size=takes_image_size)
    front = await start([encoder, pd, aggregated])
    url, name = await images(image_bytes("blue")), identifier(image_bytes("blue"), fingerprint=FINGERPRINT)
    own = image(image_bytes("red"))
    request = asyncio.ensure_future(front.post(ask("x", own, image(url), temperature=0.5)))
    await asyncio.wait_for(encoder.arrived.acquire(), 60)
    if takes_image_size:
        await asyncio.wait_for(pd.arrived.acquire(), 60)
    await encoder.kill()
    answer = await request
    assert answer.status == 200
    assert 'placement;desc="aggregated ' in answer.headers["server-timing"]
    assert aggregated.received[0].json == ask("x", own, image(image_bytes("blue"), uuid=name), temperature=0.5)
    assert len(pd.received) == takes_image_size
    await until_idle(front)


async def test_a_stream_begins_at_an_aggregated_instance_when_the_last_encoder_is_gone(start: Start) -> None:
    encoder, pd, aggregated = stuck_fleet()

    async def head_only(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await begin_stream(request)
        return await never(instance, request, received)

    pd.answer = head_only
    front = await start([encoder, pd, aggregated])
    request = asyncio.ensure_future(listen(front, ask(image(image_bytes()), stream=True)))
    await asyncio.wait_for(encoder.arrived.acquire(), 60)
    await asyncio.wait_for(pd.arrived.acquire(), 60)
    await encoder.kill()
    heard = await request
    assert (heard.text, heard.ended) == ("a cat", True)
    await until_idle(front)


@pytest.mark.parametrize("role", ["encoder", "pd"])
async def test_nor_is_an_image_lost_with_the_last_encoder_or_pd_that_is_stopping(start: Start, role: str) -> None:
    encoder, pd, aggregated = stuck_fleet()
    front = await start([encoder, pd, aggregated])
    leaving = encoder if role == "encoder" else pd
    leaving.health_status = 503
    leaving.answer = stopping
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert len(aggregated.received) == 1


@pytest.mark.parametrize("fault", [lose, stopping])
async def test_images_go_to_encoders_and_a_pd_when_the_last_aggregated_instance_is_gone(
    start: Start, images: Images, fault: Answering
) -> None:
    slow = Costs(prefill_seconds_per_token=1.0)
    encoder, pd, aggregated = FakeInstance("encoder"), FakeInstance("pd", costs=slow), FakeInstance("aggregated")

    async def leave(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        instance.health_status = 503
        return await fault(instance, request, received)

    aggregated.answer = leave
    front = await start([encoder, pd, aggregated])
    own, url = image(image_bytes("red")), await images(image_bytes("blue"))
    assert (await front.post(ask("x", own, image(url)))).status == 200
    assert images.fetched == 1
    assert [part["type"] for part in aggregated.received[0].parts] == ["text", "image_url", "image_url"]
    assert [part["type"] for part in pd.received[0].parts] == ["text", "image_embeds", "image_embeds"]
    assert sorted(name for one in encoder.received for name in one.identifiers) == sorted(pd.received[0].identifiers)
    await until_idle(front)


async def test_an_image_that_an_encoder_refuses_goes_to_no_aggregated_instance(start: Start) -> None:
    encoder, pd, aggregated = stuck_fleet()
    encoder.answer = refuse(400, "This is no image.")
    front = await start([encoder, pd, aggregated])
    assert (await front.post(ask(image(image_bytes())))).status == 400
    assert not aggregated.received


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """Lets ``gc.get_objects`` find only what the test makes, and not what earlier tests have left."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("only_new_objects")
async def test_what_was_sent_is_kept_only_until_the_answer_begins(start: Start) -> None:
    encoder, pd, aggregated = stuck_fleet()
    encoder.answer = encode

    async def begin_only(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await (await begin_stream(request)).write(event("a "))
        return await never(instance, request, received)

    pd.answer = begin_only
    front = await start([encoder, pd, aggregated])
    request = asyncio.ensure_future(front.post(ask(image(image_bytes()), stream=True)))
    async with asyncio.timeout(60):
        while any(type(one) in {Item, Original} for one in gc.get_objects()):
            await front.get("/health")
    await end_tasks(request)
    await until_idle(front)


@pytest.mark.usefixtures("only_new_objects")
async def test_an_answered_image_is_freed_at_once_and_not_by_the_garbage_collector(start: Start) -> None:
    front = await start([FakeInstance("encoder"), FakeInstance("pd")])
    gc.disable()
    try:
        assert (await front.post(ask(image(image_bytes())))).status == 200
        async with asyncio.timeout(60):
            while any(type(one) is Item for one in gc.get_objects()):
                await front.get("/health")
    finally:
        gc.enable()


def stuck_fleet(**health: Any) -> list[FakeInstance]:
    """Return an encoder, a PD and an aggregated instance that is slow by its costs; only the last one answers."""
    slow = Costs(prefill_seconds_per_token=1.0)
    fleet = [FakeInstance("encoder"), FakeInstance("pd", **health), FakeInstance("aggregated", costs=slow)]
    fleet[0].answer = fleet[1].answer = never
    return fleet


async def test_an_image_that_repeats_goes_to_the_instance_that_knows_it(start: Start) -> None:
    # So slow to encode that it is never worth it, however slow the machine seems to be.
    costs = Costs(images=[ImageCost(pixels=900 * 900, tokens=900, encode_seconds=1000.0)])
    fleet = [FakeInstance("aggregated", costs=costs), FakeInstance("aggregated", costs=costs)]
    front = await start(fleet)
    body = ask("look", image(image_bytes(size=(900, 900))), "what is it?")
    for _ in range(4):
        assert (await front.post(body)).status == 200
    assert sorted(len(instance.received) for instance in fleet) == [0, 4]
