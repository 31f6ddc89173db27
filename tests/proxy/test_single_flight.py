"""An image that several requests need at the same time is encoded once."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from chiasm.http.config import HttpConfig
from chiasm.proxy import encoders

from .conftest import Answer, Front, Start, ask, image, image_bytes, until_idle, when_encoded
from .instances import FakeInstance, Received, after, break_off, chat, encode, never, refuse


@pytest.fixture
def gate() -> asyncio.Event:
    return asyncio.Event()


@pytest.fixture
def encoder(gate: asyncio.Event) -> FakeInstance:
    """It answers when the gate is open."""

    async def wait(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await gate.wait()
        return await encode(instance, request, received)

    instance = FakeInstance("encoder")
    instance.answer = wait
    return instance


@pytest.fixture
def pd(gate: asyncio.Event) -> FakeInstance:
    instance = FakeInstance("pd")
    instance.answer = after(gate, chat)
    return instance


async def joined(front: Front, count: int) -> None:
    while await front.metric('chiasm_proxy_items_total{outcome="joined"}') < count:
        pass


async def test_ten_simultaneous_requests_cost_one_call(
    start: Start, encoder: FakeInstance, pd: FakeInstance, gate: asyncio.Event
) -> None:
    front = await start([encoder, pd])
    requests = [asyncio.ensure_future(front.post(ask("x", image(image_bytes())))) for _ in range(10)]
    await joined(front, 9)
    gate.set()
    assert {answer.status for answer in await asyncio.gather(*requests)} == {200}
    assert len(encoder.received) == 1
    assert len(pd.received) == 10
    assert len({received.identifiers[0] for received in pd.received}) == 1


async def test_images_that_are_being_encoded_are_not_sent_again(
    start: Start, encoder: FakeInstance, pd: FakeInstance, gate: asyncio.Event
) -> None:
    front = await start([encoder, pd])
    one = asyncio.ensure_future(front.post(ask(image(image_bytes("red")), image(image_bytes("blue")))))
    await encoder.arrived.acquire()
    two = asyncio.ensure_future(front.post(ask(image(image_bytes("blue")), image(image_bytes("green")))))
    await encoder.arrived.acquire()
    gate.set()
    assert {(await one).status, (await two).status} == {200}
    assert [len(received.identifiers) for received in encoder.received] == [2, 1]


async def test_tenants_do_not_share(start: Start, encoder: FakeInstance, pd: FakeInstance, gate: asyncio.Event) -> None:
    front = await start([encoder, pd])
    requests = [asyncio.ensure_future(front.post(ask(image(image_bytes()), cache_salt=salt))) for salt in "ab"]
    await encoder.arrived.acquire()
    await encoder.arrived.acquire()
    gate.set()
    await asyncio.gather(*requests)
    assert len(encoder.received) == 2


@pytest.mark.parametrize("keys", [("wrong", "right"), ("right", "wrong")])
async def test_a_key_that_only_an_encoder_knows_counts_for_its_own_requests(
    start: Start, gate: asyncio.Event, keys: tuple[str, str]
) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")

    async def heed(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await gate.wait()
        is_right = received.headers["Authorization"] == "Bearer right"
        return await (encode if is_right else refuse(401, "The key is wrong."))(instance, request, received)

    async def wait_for_embedding(
        instance: FakeInstance, request: web.Request, received: Received
    ) -> web.StreamResponse:
        is_right = received.headers["Authorization"] == "Bearer right"
        return await (when_encoded(front, chat) if is_right else never)(instance, request, received)

    encoder.answer, pd.answer = heed, wait_for_embedding
    front = await start([encoder, pd], deadline_seconds=20.0)
    requests: dict[str, asyncio.Future[Answer]] = {}
    for key in keys:
        headers = {"Authorization": f"Bearer {key}"}
        requests[key] = asyncio.ensure_future(front.post(ask("x", image(image_bytes())), **headers))
        await pd.arrived.acquire()  # which is called when the image waits for its encoder
    gate.set()
    assert {key: (await request).status for key, request in requests.items()} == {"right": 200, "wrong": 401}


async def test_keys_that_the_proxy_knows_share(
    start: Start, encoder: FakeInstance, pd: FakeInstance, gate: asyncio.Event
) -> None:
    keys = ("one" * 8, "two" * 8)
    front = await start([encoder, pd], http=HttpConfig(api_key=keys))
    body = ask("x", image(image_bytes()))
    requests = [asyncio.ensure_future(front.post(body, Authorization=f"Bearer {key}")) for key in keys]
    await pd.arrived.acquire()
    await pd.arrived.acquire()
    gate.set()
    assert [(await request).status for request in requests] == [200, 200]
    assert len(encoder.received) == 1


async def test_a_client_that_leaves_does_not_affect_others(
    start: Start, encoder: FakeInstance, pd: FakeInstance, gate: asyncio.Event
) -> None:
    front = await start([encoder, pd])
    first = asyncio.ensure_future(front.post(ask("first", image(image_bytes()))))
    await encoder.arrived.acquire()
    second = asyncio.ensure_future(front.post(ask("second", image(image_bytes()))))
    await joined(front, 1)
    first.cancel()
    await asyncio.wait_for(pd.gone.acquire(), 60)
    gate.set()
    assert (await second).status == 200
    assert len(encoder.received) == 1


async def test_a_deadline_that_passes_does_not_affect_others(
    start: Start, encoder: FakeInstance, pd: FakeInstance, gate: asyncio.Event
) -> None:
    async def heed(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await gate.wait()
        is_late = int(received.headers["X-Request-Deadline-Ms"]) <= 1000
        answer = refuse(504, "The deadline has passed.", kind="timeout_error") if is_late else encode
        return await answer(instance, request, received)

    encoder.answer = heed
    front = await start([encoder, pd])
    body = ask("x", image(image_bytes()))
    hurried = asyncio.ensure_future(front.post(body, **{"X-Request-Deadline-Ms": "1000"}))
    await encoder.arrived.acquire()
    patient = asyncio.ensure_future(front.post(body))
    assert (await hurried).status == 504
    gate.set()
    assert (await patient).status == 200


async def test_the_encoder_call_ends_when_all_clients_have_left(
    start: Start, encoder: FakeInstance, pd: FakeInstance
) -> None:
    front = await start([encoder, pd])
    requests = [asyncio.ensure_future(front.post(ask(str(n), image(image_bytes())))) for n in range(3)]
    await joined(front, 2)
    for request in requests:
        request.cancel()
    await asyncio.wait_for(encoder.gone.acquire(), 60)
    assert not front.service.router.encoders._flights


@pytest.mark.parametrize("stream", [False, True])
async def test_an_encoder_that_is_heard_after_the_answer_is_counted_and_learned_from(
    start: Start, encoder: FakeInstance, gate: asyncio.Event, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A language instance may have read an embedding, and answered, before the encoder tells the proxy of it."""
    monkeypatch.setattr(encoders, "_AFTER_ANSWER_SECONDS", 60.0)
    front = await start([encoder, FakeInstance("pd")])
    assert (await front.post(ask(image(image_bytes()), stream=stream))).status == 200
    assert await front.metric('chiasm_proxy_items_total{outcome="encoded"}') == 0
    gate.set()
    await until_idle(front)
    assert await front.metric('chiasm_proxy_items_total{outcome="encoded"}') == 1
    (received,) = encoder.received
    assert front.service.router._placement.images._published.copies == {received.identifiers[0]: 1}


async def test_an_encoder_that_fails_after_the_answer_costs_nothing(
    start: Start, encoder: FakeInstance, gate: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders, "_AFTER_ANSWER_SECONDS", 60.0)

    async def fail(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await gate.wait()
        await break_off(request)
        raise ConnectionError

    encoder.answer = fail
    front = await start([encoder, FakeInstance("pd")])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    gate.set()
    await until_idle(front)
    assert not front.service.router.encoders._flights
    assert len(encoder.received) == 1


async def test_an_encoder_is_not_waited_for_long_after_the_answer(
    start: Start, encoder: FakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders, "_AFTER_ANSWER_SECONDS", 0.0)
    front = await start([encoder, FakeInstance("pd")])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    await until_idle(front)
    assert not front.service.router.encoders._flights
    if encoder.received:  # otherwise the call was cancelled before it was sent
        await asyncio.wait_for(encoder.gone.acquire(), 60)


async def test_a_call_continues_for_an_image_that_somebody_waits_for(
    start: Start, encoder: FakeInstance, pd: FakeInstance, gate: asyncio.Event
) -> None:
    front = await start([encoder, pd])
    first = asyncio.ensure_future(front.post(ask(image(image_bytes("red")), image(image_bytes("blue")))))
    await encoder.arrived.acquire()
    second = asyncio.ensure_future(front.post(ask(image(image_bytes("blue")))))
    await joined(front, 1)
    first.cancel()
    await asyncio.wait_for(pd.gone.acquire(), 60)
    third = asyncio.ensure_future(front.post(ask(image(image_bytes("red")))))  # given up: it begins anew
    await encoder.arrived.acquire()
    gate.set()
    assert {(await second).status, (await third).status} == {200}
    assert [len(received.identifiers) for received in encoder.received] == [2, 1]


async def test_a_bad_image_fails_only_its_own_request(start: Start, gate: asyncio.Event) -> None:
    """Two requests share a good image; the one that began its encoding sent a bad one along."""
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")

    async def refuse_pairs(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await gate.wait()
        if len(received.identifiers) > 1:
            return web.json_response({"error": {"message": "the second is broken"}}, status=400)
        encoded.set()
        return await encode(instance, request, received)

    async def chat_when_encoded(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        if len(received.identifiers) > 1:
            return await never(instance, request, received)
        await encoded.wait()
        return await chat(instance, request, received)

    encoded = asyncio.Event()
    encoder.answer, pd.answer = refuse_pairs, chat_when_encoded
    front = await start([encoder, pd])
    bad = asyncio.ensure_future(front.post(ask(image(image_bytes("red")), image(image_bytes("blue")))))
    await encoder.arrived.acquire()
    good = asyncio.ensure_future(front.post(ask(image(image_bytes("red")))))
    await joined(front, 1)
    gate.set()
    assert (await bad).status == 400
    assert (await good).status == 200


async def test_a_later_request_is_a_new_call(
    start: Start, encoder: FakeInstance, pd: FakeInstance, gate: asyncio.Event
) -> None:
    gate.set()
    front = await start([encoder, pd])
    for _ in range(2):
        assert (await front.post(ask(image(image_bytes())))).status == 200
    assert len(encoder.received) == 2
