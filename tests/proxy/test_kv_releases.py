"""Whatever ends a request between prefill and decode, the prefill instance is told that nobody will fetch its KV."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from .conftest import Start, ask, image, image_bytes, leave, listen, until_idle
from .instances import (
    WORDS,
    Answering,
    FakeInstance,
    Received,
    begin_stream,
    decode,
    event,
    lose,
    never,
    once,
    prefill,
    refuse,
    role_event,
    vllm_decode,
    vllm_prefill,
)

WAIT_SECONDS = 10


async def released(instance: FakeInstance) -> list[str]:
    return await asyncio.wait_for(instance.released.get(), WAIT_SECONDS)


async def token_without_handle(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
    response = await begin_stream(request)
    await response.write(role_event() + event(WORDS[0]))
    return await never(instance, request, received)


@pytest.mark.parametrize("streams", [True, False])
async def test_a_client_that_leaves_before_decode_has_answered(start: Start, streams: bool) -> None:
    p, d = FakeInstance("prefill"), FakeInstance("decode")
    d.answer = never
    front = await start([p, d])
    await leave(front, ask("x", stream=streams), p, d)
    assert await released(p) == [p.received[0].lease]
    await until_idle(front)


async def test_a_client_that_leaves_before_the_handle_has_come(start: Start) -> None:
    p, d = FakeInstance("prefill"), FakeInstance("decode")
    p.answer = token_without_handle
    front = await start([p, d])
    await leave(front, ask("x", stream=True), p)
    assert await released(p) == [p.received[0].lease]


async def test_an_encoder_that_refuses_an_image_before_the_handle_has_come(start: Start) -> None:
    """Prefill may hold KV all the same: it needs no embedding for a prompt that it has computed before."""
    encoder, p, d = FakeInstance("encoder"), FakeInstance("prefill"), FakeInstance("decode")

    async def refuse_late(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await p.arrived.acquire()
        return await refuse(400, "no")(instance, request, received)

    encoder.answer, p.answer = refuse_late, token_without_handle
    front = await start([encoder, p, d])
    await front.post(ask(image(image_bytes()), stream=True))
    assert await released(p) == [p.received[0].lease]


async def test_a_deadline_that_passes_before_decode_has_answered(start: Start) -> None:
    p, d = FakeInstance("prefill"), FakeInstance("decode")
    d.answer = never
    front = await start([p, d], deadline_seconds=3.0)
    assert (await front.post(ask("x"))).status == 504
    assert await released(p) == [p.received[0].lease]


@pytest.mark.parametrize("answer", [refuse(400, "no"), lose], ids=["refused", "lost"])
async def test_a_decode_instance_that_does_not_take_the_request(start: Start, answer: Answering) -> None:
    p, d = FakeInstance("prefill"), FakeInstance("decode")
    d.answer = answer
    front = await start([p, d], max_prefill_attempts=1)
    assert (await front.post(ask("x"))).status != 200
    assert await released(p) == [p.received[0].lease]


async def test_a_prompt_that_is_prefilled_again_gives_back_what_the_first_instance_holds(start: Start) -> None:
    ps, d = [FakeInstance("prefill"), FakeInstance("prefill")], FakeInstance("decode")
    once(refuse(503, "no KV", kind="kv_unavailable_error", code="kv_unavailable"), decode, d)
    front = await start([*ps, d])
    assert (await front.post(ask("x"))).status == 200
    first, second = sorted(ps, key=lambda p: p.released.empty())
    assert await released(first) == [first.received[0].lease]
    assert second.received[0].lease != first.received[0].lease
    assert second.released.empty()


async def test_the_end_of_the_proxy(start: Start) -> None:
    p, d = FakeInstance("prefill"), FakeInstance("decode")
    d.answer = never
    front = await start([p, d])
    asking = asyncio.ensure_future(front.post(ask("x")))
    await asyncio.wait_for(d.arrived.acquire(), WAIT_SECONDS)
    front.service.interrupt_all()
    assert (await asking).status == 503
    assert await released(p) == [p.received[0].lease]


async def test_it_is_told_again_if_it_did_not_answer(start: Start) -> None:
    p, d = FakeInstance("prefill"), FakeInstance("decode")
    p.unanswered_releases, d.answer = 1, never
    front = await start([p, d])
    await leave(front, ask("x", stream=True), p, d)
    assert await released(p) == [p.received[0].lease]


async def test_it_is_told_with_the_key_of_the_client(start: Start) -> None:
    p, d = FakeInstance("prefill", needs_key=True), FakeInstance("decode")
    p.key, d.answer = "k" * 16, refuse(400, "no")
    front = await start([p, d])
    assert (await front.post(ask("x"), Authorization=f"Bearer {p.key}")).status == 400
    await released(p)
    async with asyncio.timeout(WAIT_SECONDS):
        while await front.metric("chiasm_proxy_leases_given_back_total") != 1:
            pass  # each look takes a turn of its own


async def test_nothing_is_given_back_when_decode_answers_or_prefill_refuses(start: Start) -> None:
    p, d = FakeInstance("prefill"), FakeInstance("decode")
    once(refuse(400, "no"), prefill, p)
    front = await start([p, d])
    assert (await front.post(ask("x"))).status == 400
    assert (await listen(front, ask("x", stream=True))).ended
    await until_idle(front)
    assert p.released.empty()


async def test_prefill_instances_of_vllm_are_not_told(start: Start) -> None:
    p, d = vllm_prefill(), vllm_decode()
    d.answer = refuse(400, "no")
    front = await start([p, d])
    assert (await front.post(ask("x"))).status == 400
    await until_idle(front)
    assert p.released.empty()
