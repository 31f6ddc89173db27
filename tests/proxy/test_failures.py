"""Instances that die, hang or refuse, and clients that leave."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from chiasm.proxy.upstream import Call, Upstream
from chiasm.tasks import end_tasks

from .conftest import Start, ask, image, image_bytes, leave, listen, until_idle, when_encoded
from .instances import (
    Answering,
    FakeInstance,
    Received,
    after,
    chat,
    encode,
    event,
    half_a_response,
    interrupted_by,
    lose,
    never,
    once,
    only_a_head,
    received_by,
    refuse,
)


def other(instances: list[FakeInstance], one: FakeInstance) -> FakeInstance:
    return next(instance for instance in instances if instance is not one)


async def first_arrival(instances: list[FakeInstance]) -> FakeInstance:
    """The instance that gets the first request."""
    tasks = {asyncio.ensure_future(one.arrived.acquire()): one for one in instances}
    done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=60)
    for task in waiting:
        task.cancel()
    return tasks[done.pop()]


# Encoders


async def test_an_encoder_killed_during_a_call_costs_a_retry(start: Start) -> None:
    encoders, pd = [FakeInstance("encoder"), FakeInstance("encoder")], FakeInstance("pd")

    for encoder in encoders:
        encoder.answer = never
    front = await start([*encoders, pd])
    pd.answer = when_encoded(front, chat)
    request = asyncio.ensure_future(front.post(ask("x", image(image_bytes()))))
    killed = await first_arrival(encoders)
    other(encoders, killed).answer = encode
    await killed.kill()
    answer = await request
    assert answer.status == 200, answer.body
    assert (await front.states())[killed.url] == "unhealthy"
    assert await front.metric("chiasm_proxy_encode_retries_total") == 1
    assert len(pd.received) == 1
    await until_idle(front)


async def test_a_retry_is_a_call_like_the_first(start: Start) -> None:
    """The encoder publishes one of two images; only the other one goes to the next encoder."""
    encoders, pd = [FakeInstance("encoder"), FakeInstance("encoder")], FakeInstance("pd")

    async def only_the_first(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        entries = {received.identifiers[0]: {"item_indices": [0], "metadata": {}}}
        return web.json_response({"ec_transfer_params": entries, "kv_transfer_params": {"handle": 1}})

    for encoder in encoders:
        encoder.answer = only_the_first
    pd.answer = never
    front = await start([*encoders, pd])
    large, small = image(image_bytes(size=(90, 90))), [image(image_bytes(size=(9, n))) for n in (8, 9)]
    request = asyncio.ensure_future(front.post(ask(large, *small)))
    while await front.metric('chiasm_proxy_items_total{outcome="encoded"}') < 3:
        pass
    pair = next(received for encoder in encoders for received in encoder.received if len(received.identifiers) == 2)
    with_pair = next(encoder for encoder in encoders if pair in encoder.received)
    retry = other(encoders, with_pair).received[-1]
    assert retry.identifiers == pair.identifiers[1:]
    assert retry.json.keys() == pair.json.keys()
    ids = {received.headers["X-Request-Id"] for encoder in encoders for received in encoder.received}
    assert {one.rpartition("-")[2] for one in ids} == {"e1", "e2", "e3"}
    assert int(retry.headers["X-Request-Deadline-Ms"]) <= int(pair.headers["X-Request-Deadline-Ms"])
    await end_tasks(request)


async def test_no_encoder_left_is_a_503_and_ends_the_pd_call(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    encoder.answer = pd.answer = never
    front = await start([encoder, pd])
    for stream in (False, True):
        request = asyncio.ensure_future(front.post(ask("x", image(image_bytes()), stream=stream)))
        await encoder.arrived.acquire()
        await pd.arrived.acquire()
        await encoder.kill()
        answer = await request
        assert answer.status == 503
        assert answer.error["code"] == "encoder_lost"
        assert "Retry-After" in answer.headers
        await asyncio.wait_for(pd.gone.acquire(), 60)
        await encoder.start()
        await front.until(encoder, "healthy")
    await until_idle(front)


async def test_text_is_answered_without_any_encoder(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd])
    await encoder.kill()
    await front.until(encoder, "unhealthy")
    answer = await front.post(ask("x", image(image_bytes())))
    assert answer.status == 503
    assert answer.error["code"] == "no_encoder"
    assert int(answer.headers["Retry-After"]) >= 1
    assert (await front.post(ask("x"))).status == 200
    assert (await front.get("/health")).status == 200
    await encoder.start()
    await front.until(encoder, "healthy")
    assert (await front.post(ask("x", image(image_bytes())))).status == 200


@pytest.mark.parametrize("status", [500, 503, 429])
async def test_an_encoder_error_costs_a_retry(start: Start, status: int) -> None:
    encoders, pd = [FakeInstance("encoder"), FakeInstance("encoder")], FakeInstance("pd")
    encoders[0].answer = refuse(status, "no memory")
    front = await start([*encoders, pd])
    pd.answer = never
    tasks = [asyncio.ensure_future(front.post(ask("x", image(image_bytes(size=(5, n)))))) for n in (1, 2)]
    while await front.metric('chiasm_proxy_items_total{outcome="encoded"}') < 2:
        pass
    assert len(encoders[0].received) >= 1
    assert len(encoders[1].received) == 2
    await end_tasks(*tasks)


async def test_the_last_of_all_failed_attempts_reaches_the_client(start: Start) -> None:
    encoders, pd = [FakeInstance("encoder") for _ in range(3)], FakeInstance("pd")
    for encoder in encoders:
        encoder.answer = refuse(500, "no memory")
    pd.answer = never
    front = await start([*encoders, pd], max_encode_attempts=2)
    answer = await front.post(ask("x", image(image_bytes())))
    assert answer.status == 500
    assert answer.error["message"] == "no memory"
    assert sum(len(encoder.received) for encoder in encoders) == 2


async def test_an_encoder_that_hangs_is_abandoned(start: Start) -> None:
    encoders, pd = [FakeInstance("encoder"), FakeInstance("encoder")], FakeInstance("pd")
    encoders[0].answer = pd.answer = never
    front = await start([*encoders, pd], encode_timeout_seconds=3.0)
    tasks = [asyncio.ensure_future(front.post(ask("x", image(image_bytes(size=(5, n)))))) for n in (1, 2)]
    while await front.metric('chiasm_proxy_items_total{outcome="encoded"}') < 2:
        pass
    await asyncio.wait_for(encoders[0].gone.acquire(), 60)
    await end_tasks(*tasks)


@pytest.mark.parametrize(
    "body", [b"", b"no json", b"{}", b'{"ec_transfer_params": {"x": {}}}', b'{"ec_transfer_params": 1}']
)
async def test_a_malformed_encoder_answer_fails_the_image(start: Start, body: bytes) -> None:
    async def nonsense(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        return web.Response(body=body)

    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    encoder.answer, pd.answer = nonsense, never
    front = await start([encoder, pd])
    answer = await front.post(ask("x", image(image_bytes())))
    assert answer.status == 503
    assert answer.error["code"] == "encoder_lost"
    assert "An encoder's answer doesn't name the image in ec_transfer_params." in answer.error["message"]


@pytest.mark.parametrize("status", [204, 302])
async def test_an_encoder_that_gives_no_answer_fails_the_image(start: Start, status: int) -> None:
    async def redirect(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        return web.Response(status=status, headers={"Location": "https://127.0.0.1"})

    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    encoder.answer, pd.answer = redirect, never
    front = await start([encoder, pd])
    answer = await front.post(ask("x", image(image_bytes())))
    assert (answer.status, answer.error["code"]) == (503, "encoder_lost")
    assert f"An encoder answered with status {status}." in answer.error["message"]


async def test_an_unexpected_error_of_a_call_is_that_of_its_requests_and_of_none_later(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd])
    pd.answer = never
    usual = Upstream.post

    async def fail(self: Upstream, instance_url: str, *arguments: Any, **more: Any) -> Call:
        if instance_url == encoder.url:
            raise ValueError("Nobody has thought of this.")
        return await usual(self, instance_url, *arguments, **more)

    monkeypatch.setattr(Upstream, "post", fail)
    answer = await front.post(ask("x", image(image_bytes())))
    assert (answer.status, answer.error["type"]) == (500, "internal_error")
    monkeypatch.undo()
    pd.answer = when_encoded(front, chat)
    assert (await front.post(ask("x", image(image_bytes())))).status == 200
    await until_idle(front)


async def test_pd_may_answer_without_the_encoder(start: Start) -> None:
    """If it had the embedding, the encoder isn't waited for."""
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    encoder.answer = never
    front = await start([encoder, pd])
    assert (await front.post(ask("x", image(image_bytes())))).status == 200
    await asyncio.wait_for(encoder.gone.acquire(), 60)
    assert (await front.post(ask("x", image(image_bytes()), stream=True))).body.endswith(b"data: [DONE]\n\n")
    await until_idle(front)
    assert await front.metric('chiasm_proxy_requests_total{route="/v1/chat/completions",status="200"}') == 2


@pytest.mark.parametrize("fault", ["lost", "refused"])
async def test_an_encoder_that_fails_during_a_stream_costs_nothing(start: Start, fault: str) -> None:
    """The PD had the image's prefix in its cache, and needed no embedding."""
    encoder, pd, has_begun, has_failed = FakeInstance("encoder"), FakeInstance("pd"), asyncio.Event(), asyncio.Event()
    pd.answer = interrupted_by(has_failed)
    encoder.answer = after(has_begun, lose if fault == "lost" else refuse(400, "no image"))
    front = await start([encoder, pd], max_encode_attempts=1)
    stream = asyncio.ensure_future(listen(front, ask(image(image_bytes()), stream=True), {1: has_begun}))
    while not await front.metric('chiasm_proxy_items_total{outcome="failed"}'):
        pass
    has_failed.set()
    heard = await stream
    assert (heard.text, heard.ended, heard.error) == ("a cat", True, None)
    await until_idle(front)


# PD


async def test_an_unreachable_pd_costs_a_retry(start: Start) -> None:
    pds = [FakeInstance("pd"), FakeInstance("pd")]
    front = await start([*pds], probe_interval_seconds=60)
    await pds[0].kill()
    for _ in range(3):
        assert (await front.post(ask("x"))).status == 200
    assert (await front.states())[pds[0].url] == "unhealthy"
    assert len(pds[1].received) == 3


async def test_a_pd_killed_before_its_answer_costs_a_retry(start: Start) -> None:
    pds = [FakeInstance("pd"), FakeInstance("pd")]
    encoder = FakeInstance("encoder")
    for pd in pds:
        pd.answer = never
    front = await start([encoder, *pds])
    for body in (ask("x"), ask("x", image(image_bytes()), stream=True)):
        request = asyncio.ensure_future(front.post(body))
        killed = await first_arrival(pds)
        other(pds, killed).answer = chat
        await killed.kill()
        assert (await request).status == 200
        assert other(pds, killed).received[-1].body == killed.received[-1].body
        await killed.start()
        for pd in pds:
            pd.answer = never
        await front.until(killed, "healthy")
        while (await first_arrival(pds)) is killed:
            pass
    assert await front.metric("chiasm_proxy_language_retries_total") == 2


async def test_losing_the_last_pd_is_an_error(start: Start) -> None:
    pd = FakeInstance("pd")
    pd.answer = never
    front = await start([pd])
    request = asyncio.ensure_future(front.post(ask("x")))
    await pd.arrived.acquire()
    await pd.kill()
    answer = await request
    assert (answer.status, answer.error["code"]) == (503, "no_pd")
    answer = await front.post(ask("x"))
    assert answer.status == 503
    assert answer.error["code"] == "no_pd"
    assert "Retry-After" in answer.headers
    assert (await front.get("/health")).status == 503


@pytest.mark.parametrize("fault", [lose, half_a_response, only_a_head])
async def test_a_pd_lost_before_the_client_has_anything_costs_a_retry(start: Start, fault: Answering) -> None:
    pds = [FakeInstance("pd"), FakeInstance("pd")]
    once(fault, chat, *pds)
    front = await start([*pds])
    assert (await front.post(ask("x", stream=fault is only_a_head))).status == 200
    assert [len(pd.received) for pd in pds] == [1, 1]


async def test_attempts_of_a_request_that_takes_instances_down_are_bounded(start: Start) -> None:
    pds = [FakeInstance("pd"), FakeInstance("pd")]
    for pd in pds:
        pd.answer = half_a_response
    front = await start([*pds])
    answer = await front.post(ask("x"))
    assert (answer.status, answer.error["type"], answer.error["code"]) == (502, "upstream_error", "instance_lost")
    assert len(received_by(pds)) == 3


@pytest.mark.parametrize("code", ["starting", "stopping", "failed"])
async def test_a_pd_that_leaves_costs_a_retry(start: Start, code: str) -> None:
    pds = [FakeInstance("pd"), FakeInstance("pd")]
    once(refuse(503, "leaving", kind="overloaded_error", code=code), chat, *pds)
    front = await start([*pds])
    assert (await front.post(ask("x"))).status == 200
    assert [len(pd.received) for pd in pds] == [1, 1]


@pytest.mark.parametrize("status", [502, 503])
async def test_a_pd_that_a_reverse_proxy_before_it_does_not_reach_costs_a_retry(start: Start, status: int) -> None:
    pds = [FakeInstance("pd"), FakeInstance("pd")]

    async def unreached(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        return web.Response(status=status, text="<h1>Bad Gateway</h1>", content_type="text/html")

    once(unreached, chat, *pds)
    front = await start(pds)
    assert (await front.post(ask("x"))).status == 200
    assert [len(pd.received) for pd in pds] == [1, 1]


async def test_an_answer_that_is_too_long_is_an_error(start: Start) -> None:
    pd = FakeInstance("pd")
    front = await start([pd], max_answer_bytes=100)
    assert (await front.post(ask("x"))).status == 502


async def test_a_connection_closed_while_idle_costs_nothing(start: Start) -> None:
    """The instance closes an idle connection just when the next request is sent on it."""
    pd = FakeInstance("pd")
    front = await start([pd], probe_interval_seconds=60)
    closed = 0

    async def close_first(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        nonlocal closed
        if not closed:
            closed += 1
            assert request.transport is not None
            request.transport.abort()
        return await chat(instance, request, received)

    pd.answer = close_first
    assert (await front.post(ask("x"))).status == 200
    assert (await front.states())[pd.url] == "healthy"


# Deadlines


async def test_the_deadline_covers_encoding_and_answering(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    encoder.answer = pd.answer = never
    front = await start([encoder, pd], deadline_seconds=3.0)
    for body in (ask("x"), ask("x", image(image_bytes()))):
        answer = await front.post(body)
        assert answer.status == 504
        assert answer.error["type"] == "timeout_error"
        await asyncio.wait_for(pd.gone.acquire(), 60)
    await asyncio.wait_for(encoder.gone.acquire(), 60)
    await until_idle(front)


# Clients


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_the_calls_of_encoder_and_pd(start: Start, stream: bool) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    encoder.answer = pd.answer = never
    front = await start([encoder, pd])
    await leave(front, ask("x", image(image_bytes()), stream=stream), encoder, pd)
    await asyncio.wait_for(encoder.gone.acquire(), 60)
    await asyncio.wait_for(pd.gone.acquire(), 60)
    while not await front.metric('chiasm_proxy_requests_total{route="/v1/chat/completions",status="499"}'):
        pass
    await until_idle(front)


async def test_a_client_that_leaves_in_a_stream_ends_it(start: Start) -> None:
    pd = FakeInstance("pd")

    async def endless(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(event("one"))
        return await never(instance, request, received)

    pd.answer = endless
    front = await start([pd])
    async with aiohttp.ClientSession() as session:
        response = await session.post(f"{front.url}/v1/chat/completions", json=ask("x", stream=True))
        await response.content.readuntil(b"\n\n")
        response.close()
        await asyncio.wait_for(pd.gone.acquire(), 60)


async def test_a_client_that_leaves_while_media_is_fetched(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd])
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.setblocking(False)
        request = asyncio.ensure_future(leave(front, ask(image(f"http://127.0.0.1:{silent.getsockname()[1]}/"))))
        connection, _ = await asyncio.get_running_loop().sock_accept(silent)
        with connection:
            await request
            loop = asyncio.get_running_loop()
            while await asyncio.wait_for(loop.sock_recv(connection, 4096), 60):
                pass  # until the proxy hangs up
    assert not pd.received
    assert not encoder.received


async def test_an_error_of_an_instance_that_is_not_understood_is_passed_on_and_noted(start: Start) -> None:
    pd = FakeInstance("pd")
    said = b'{"error": {"x": ' + b"[" * 3000

    async def nonsense(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        return web.Response(status=400, body=said)

    pd.answer = nonsense
    front = await start([pd])
    answer = await front.post(ask("x"))
    assert (answer.status, answer.body) == (400, said)
    assert (await front.record(answer.headers["X-Request-Id"]))["status"] == 400
