"""Instances that are frozen or cut off: they take connections and requests, and respond to nothing."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from aiohttp import web

from chiasm.tasks import end_tasks

from .conftest import Front, Start, ask, image, image_bytes, listen, until_idle, when_encoded
from .instances import (
    SAID,
    VLLM_PAIR,
    WORDS,
    FakeInstance,
    Received,
    begin_stream,
    break_off,
    chat,
    decode,
    decode_until,
    encode,
    event,
    never,
    received_by,
)

QUICK = {"probe_timeout_seconds": 0.3, "wait_for_instance_seconds": 15.0}
"""On a busy machine all instances may seem frozen for a moment; requests wait for those that aren't."""
GIVEN_UP = "chiasm_proxy_calls_given_up_total"


def frozen(*instances: FakeInstance) -> None:
    for one in instances:
        one.awake.clear()


async def frozen_with_work(front: Front, instances: list[FakeInstance], body: Any) -> tuple[FakeInstance, bytes]:
    """Freeze all instances, and wake all but the one that gets the request; return it and the answer."""
    frozen(*instances)
    request = asyncio.ensure_future(front.post(body))
    while not received_by(instances):
        await front.get("/health")
    (busy,) = [one for one in instances if one.received]
    for one in instances:
        if one is not busy:
            one.awake.set()
    answer = await request
    assert answer.status == 200, answer.body
    return busy, answer.body


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("role", ["pd", "aggregated"])
async def test_requests_of_a_frozen_instance_go_to_another(start: Start, role: str, stream: bool) -> None:
    instances = [FakeInstance(role), FakeInstance(role)]
    front = await start([*instances], **QUICK)
    busy, _ = await frozen_with_work(front, instances, ask("x", stream=stream))
    assert (await front.states())[busy.url] == "unhealthy"
    assert await front.metric(GIVEN_UP) == 1
    await until_idle(front)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("engine", ["chiasm", "vllm"])
async def test_so_do_those_of_a_frozen_prefill_or_decode_instance(start: Start, role: str, engine: str) -> None:
    def made(role: str) -> FakeInstance:
        if engine == "chiasm":
            return FakeInstance(role)
        return VLLM_PAIR.prefill() if role == "prefill" else VLLM_PAIR.decode()

    instances = [made(role), made(role)]
    front = await start([*instances, made("decode" if role == "prefill" else "prefill")], **QUICK)
    _, body = await frozen_with_work(front, instances, ask("x"))
    assert SAID.encode() in body


async def test_images_of_a_frozen_encoder_go_to_another(start: Start) -> None:
    encoders, pd = [FakeInstance("encoder"), FakeInstance("encoder")], FakeInstance("pd")
    front = await start([*encoders, pd], **QUICK)
    pd.answer = when_encoded(front, chat)
    await frozen_with_work(front, encoders, ask(image(image_bytes())))
    assert len(received_by(encoders)) == 2


async def test_a_stream_ends_with_an_error_when_its_instance_freezes(start: Start) -> None:
    pd = FakeInstance("pd")

    async def freeze(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        response = await begin_stream(request)
        await response.write(event("one"))
        frozen(pd)
        return await never(instance, request, received)

    pd.answer = freeze
    front = await start([pd], **QUICK)
    heard = await listen(front, ask("x", stream=True))
    assert heard.words == ["one"]
    assert heard.error is not None
    assert heard.error["code"] == "instance_lost"
    assert "stopped responding" in heard.error["message"]
    assert not heard.ended


async def test_a_stream_goes_on_when_its_decode_instance_freezes(start: Start) -> None:
    p, ds = FakeInstance("prefill"), [FakeInstance("decode"), FakeInstance("decode")]

    async def freeze(request: web.Request, response: web.StreamResponse) -> None:
        (busy,) = [d for d in ds if d.received]
        frozen(busy)
        for d in ds:
            d.answer = decode
        await asyncio.Event().wait()

    for d in ds:
        d.answer = decode_until(4, freeze)
    front = await start([p, *ds], **QUICK)
    heard = await listen(front, ask("x", stream=True))
    assert (heard.words, heard.ended) == (list(WORDS), True)


@pytest.mark.parametrize("role", ["encoder", "pd", "aggregated", "prefill", "decode"])
async def test_the_calls_of_the_last_instance_wait_for_it(start: Start, role: str) -> None:
    """There is nowhere to go, and it may only be busy, as it is when it gets many requests at once."""
    partner = {"encoder": "pd", "prefill": "decode", "decode": "prefill"}
    one, others = FakeInstance(role), [FakeInstance(partner[role])] if role in partner else []
    body = ask(image(image_bytes())) if role == "encoder" else ask("x")
    may_answer = asyncio.Event()

    async def answer(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await may_answer.wait()
        return await chat(instance, request, received)

    if role == "encoder":
        others[0].answer = answer
    front = await start([one, *others], probe_timeout_seconds=60.0, busy_probe_timeout_seconds=0.2)
    frozen(one)
    request = asyncio.ensure_future(front.post(body))
    await asyncio.wait_for(one.arrived.acquire(), 60)
    await front.until(one, "unhealthy")
    may_answer.set()
    one.awake.set()
    assert (await request).status == 200
    assert len(one.received) == 1
    assert await front.metric(GIVEN_UP) == 0
    await until_idle(front)


async def test_an_instance_that_continues_is_healthy_and_has_lost_its_old_calls(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "chiasm.proxy")
    pds = [FakeInstance("pd"), FakeInstance("pd")]
    front = await start([*pds], **QUICK)
    busy, _ = await frozen_with_work(front, pds, ask("x"))
    await asyncio.wait_for(busy.gone.acquire(), 60)
    busy.awake.set()
    await front.until(busy, "healthy")
    assert await front.metric('chiasm_proxy_instances_returned_total{role="pd"}') == 1
    assert "responds again" in caplog.text
    assert (await front.post(ask("x"))).status == 200


async def test_an_instance_that_computes_for_long_is_left_alone(start: Start) -> None:
    pd = FakeInstance("pd")
    pd.answer = never
    front = await start([pd], **QUICK, probe_interval_seconds=60)
    request = asyncio.ensure_future(front.post(ask("x")))
    await pd.arrived.acquire()
    before = pd.probes
    while pd.probes < before + 3:
        await front.get("/health")
    assert (await front.states())[pd.url] == "healthy"
    assert not request.done()
    await end_tasks(request)


async def test_the_bytes_of_an_answer_show_that_an_instance_lives(start: Start) -> None:
    """Its probes get no response, but it isn't silent: no call is given up."""
    pd, words = FakeInstance("pd"), 0

    async def speak(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        nonlocal words
        response = await begin_stream(request)
        pd.unanswered_probes = 1000
        while (await front.states())[pd.url] == "healthy":
            await response.write(event("word "))
            words += 1
        await response.write(b"data: [DONE]\n\n")
        return response

    pd.answer = speak
    front = await start([pd], **QUICK)
    heard = await listen(front, ask("x", stream=True))
    assert heard.ended
    assert len(heard.words) == words
    assert await front.metric(GIVEN_UP) == 0


async def test_an_image_that_several_requests_wait_for_moves_once(start: Start) -> None:
    encoders, pds = [FakeInstance("encoder"), FakeInstance("encoder")], FakeInstance("pd")
    pds.answer = never
    front = await start([*encoders, pds], **QUICK)
    frozen(*encoders)
    tasks = [asyncio.ensure_future(front.post(ask(image(image_bytes())))) for _ in range(3)]
    while await front.metric('chiasm_proxy_items_total{outcome="joined"}') < 2 or not received_by(encoders):
        pass
    (idle,) = [one for one in encoders if not one.received]
    idle.awake.set()
    idle.answer = encode
    while not await front.metric('chiasm_proxy_items_total{outcome="encoded"}'):
        pass
    assert len(idle.received) == 1
    await end_tasks(*tasks)


async def test_a_lost_connection_to_a_frozen_instance_moves_the_request(start: Start) -> None:
    """Whether it is gone shows only when its probes aren't answered."""
    pds = [FakeInstance("pd"), FakeInstance("pd")]

    async def reset(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        frozen(instance)
        for pd in pds:
            pd.answer = chat
        await break_off(request)
        raise ConnectionError

    for pd in pds:
        pd.answer = reset
    front = await start([*pds], **QUICK)
    assert (await front.post(ask("x"))).status == 200
