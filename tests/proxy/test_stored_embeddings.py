"""The proxy asks the shared cache before it calls encoders, and waits for it no longer than a moment."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from aiohttp import web

from chiasm.ec_transfer.stores import StoredEntry, StoreError, guard, open_store
from chiasm.ec_transfer.stores.redis import RedisStore
from chiasm.media import identifier
from chiasm.proxy import request_images, stored_embeddings
from chiasm.wire import ECPlace

from ..store_server import StoreServer, running
from .conftest import Front, Start, ask, image, image_bytes
from .instances import FINGERPRINT, FakeInstance, Received, never

RED, BLUE = image_bytes("red"), image_bytes("blue")
PATIENT = {"store_timeout_seconds": 20.0}
"""No test may depend on how fast a loaded machine asks the store."""


@pytest.fixture(scope="module")
def server() -> Iterator[StoreServer]:
    with running() as started:
        yield started


@pytest.fixture(autouse=True)
def only_red(server: StoreServer) -> None:
    """Have the store hold the embedding of one image."""
    server.call("FLUSHALL")
    data = memoryview(bytes(64))
    store = open_store(server.url)
    store.put(StoredEntry.of(name_of(RED), FINGERPRINT, "F32", (4, 4), data), data)
    store.close()


def name_of(data: bytes) -> str:
    return identifier(data, fingerprint=FINGERPRINT, salt="")


@pytest.fixture
def encoder() -> FakeInstance:
    return FakeInstance("encoder")


@pytest.fixture
def pd() -> FakeInstance:
    return FakeInstance("pd", reads_stored=True)


def fail_at_first(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Have the store fail so many times, and the proxy ask it again soon."""
    usual, failures = RedisStore.exists_many, iter(range(times))

    def find(*arguments: Any) -> Any:
        if next(failures, None) is not None:
            raise StoreError("It has failed.")
        return usual(*arguments)

    monkeypatch.setattr(RedisStore, "exists_many", find)
    monkeypatch.setattr(guard, "_FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(request_images, "_ASK_AGAIN_SECONDS", 0.01)


async def questions(front: Front, outcome: str) -> float:
    return await front.metric(f'chiasm_proxy_store_questions_total{{outcome="{outcome}"}}')


async def test_what_is_stored_needs_no_encoder(
    start: Start, server: StoreServer, encoder: FakeInstance, pd: FakeInstance
) -> None:
    front = await start([encoder, pd], store=server.url, **PATIENT)
    answer = await front.post(ask(image(RED), "?", image(RED)))
    assert answer.status == 200
    assert encoder.received == []
    assert pd.received[0].identifiers == [name_of(RED)] * 2
    assert [part["type"] for part in pd.received[0].parts] == ["image_embeds", "text", "image_embeds"]
    assert await front.metric('chiasm_proxy_items_total{outcome="stored"}') == 1


async def test_only_what_is_not_stored_is_encoded_and_one_question_is_enough(
    start: Start, server: StoreServer, encoder: FakeInstance, pd: FakeInstance
) -> None:
    front = await start([encoder, pd], store=server.url, **PATIENT)
    assert (await front.post(ask(image(RED), image(BLUE)))).status == 200
    assert [one.identifiers for one in encoder.received] == [[name_of(BLUE)]]
    assert await questions(front, "answered") == 1


async def test_the_store_is_not_asked_for_what_an_encoder_has_in_its_memory(start: Start, server: StoreServer) -> None:
    peer: dict[str, Any] = {"ec_connector": "SharedMemoryConnector", "ec_store": ""}
    place = ECPlace(host="10.0.0.1", port=4000, engine_id="first")
    encoder, pd = FakeInstance("encoder", ec_place=place, **peer), FakeInstance("pd", reads_stored=True, **peer)
    front = await start([encoder, pd], store=server.url, **PATIENT)
    for images in ([image(BLUE)], [image(BLUE)], [image(RED), image(BLUE)]):
        assert (await front.post(ask(*images))).status == 200
    assert [one.identifiers for one in encoder.received] == [[name_of(BLUE)]] * 3
    assert await questions(front, "answered") == 2
    await encoder.kill()
    await front.until(encoder, "unhealthy")
    assert (await front.post(ask(image(RED)))).status == 200
    assert (await front.post(ask(image(BLUE)))).status == 503
    assert await questions(front, "answered") == 4


async def test_no_encoder_is_needed_at_all_if_everything_is_stored(
    start: Start, server: StoreServer, pd: FakeInstance
) -> None:
    front = await start([pd], store=server.url, **PATIENT)
    assert (await front.post(ask(image(RED)))).status == 200
    assert (await front.post(ask(image(BLUE)))).status == 503


async def test_what_turns_out_to_be_unreadable_is_encoded(
    start: Start, server: StoreServer, encoder: FakeInstance, pd: FakeInstance
) -> None:
    gate = asyncio.Event()
    answer_of_pd, answer_of_encoder = pd.answer, encoder.answer

    async def wait_for_the_embedding(*call: object) -> object:
        await gate.wait()
        return await answer_of_pd(*call)  # type: ignore[arg-type]

    async def encode(*call: object) -> object:
        pd.awaited = []
        gate.set()
        return await answer_of_encoder(*call)  # type: ignore[arg-type]

    pd.answer, encoder.answer = wait_for_the_embedding, encode  # type: ignore[assignment]
    pd.awaited = [name_of(RED)]
    front = await start([encoder, pd], store=server.url, **PATIENT)
    assert (await front.post(ask(image(RED)))).status == 200
    assert [one.identifiers for one in encoder.received] == [[name_of(RED)]]


async def test_what_is_lost_and_still_stored_is_read_again(
    start: Start, server: StoreServer, encoder: FakeInstance, pd: FakeInstance
) -> None:
    answer = pd.answer

    async def wait_until_told_twice(*call: object) -> object:
        await pd.until_heard(lambda: [message.stored for message in pd.told] == [[name_of(RED)]] * 2)
        pd.awaited = []
        return await answer(*call)  # type: ignore[arg-type]

    pd.answer, pd.awaited = wait_until_told_twice, [name_of(RED)]  # type: ignore[assignment]
    peer: dict[str, Any] = {"ec_connector": "SharedMemoryConnector", "ec_store": ""}
    for instance in (encoder, pd):
        instance.health = msgspec.structs.replace(instance.health, **peer)  # type: ignore[type-var]
    front = await start([encoder, pd], store=server.url, **PATIENT)
    assert (await front.post(ask(image(RED)))).status == 200
    assert encoder.received == []
    assert await front.metric("chiasm_proxy_embeddings_lost_total") == 1


async def test_a_slow_store_is_waited_for_where_nobody_can_encode(
    start: Start, server: StoreServer, pd: FakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, may_answer = RedisStore.exists_many, threading.Event()

    def find(*arguments: Any) -> Any:
        assert may_answer.wait(60)
        return usual(*arguments)

    monkeypatch.setattr(RedisStore, "exists_many", find)
    monkeypatch.setattr(stored_embeddings, "_PATIENT_SECONDS", 60.0)
    front = await start([pd], store=server.url, store_timeout_seconds=0.001)
    asyncio.get_running_loop().call_later(0.1, may_answer.set)  # longer than the usual time
    assert (await front.post(ask(image(RED)))).status == 200


async def test_requests_that_come_together_all_have_the_stores_answer(
    start: Start, server: StoreServer, pd: FakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_embeddings, "_PATIENT_SECONDS", 60.0)
    front = await start([pd], store=server.url)
    answers = await asyncio.gather(*(front.post(ask(image(RED))) for _ in range(16)))
    assert {answer.status for answer in answers} == {200}
    assert await questions(front, "late") == 0


async def test_a_store_that_fails_is_asked_again_while_an_encoder_is_waited_for(
    start: Start, server: StoreServer, encoder: FakeInstance, pd: FakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at_first(monkeypatch, times=3)
    front = await start([encoder, pd], store=server.url, wait_for_instance_seconds=60.0)
    await encoder.kill()
    await front.until(encoder, "unhealthy")
    assert (await front.post(ask(image(RED)))).status == 200
    assert await questions(front, "failed") == 3


@pytest.mark.parametrize("others", [0, 1])
async def test_the_store_is_asked_again_when_the_encoder_that_had_the_image_is_lost(
    start: Start,
    server: StoreServer,
    encoder: FakeInstance,
    pd: FakeInstance,
    others: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The request then waits for an encoder only for what isn't there."""
    fail_at_first(monkeypatch, times=1)
    encode, encoder.answer = encoder.answer, never
    answer, has_all = pd.answer, asyncio.Event()

    async def when_it_has_all(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await has_all.wait()
        return await answer(instance, request, received)

    pd.answer = when_it_has_all
    front = await start([encoder, pd], store=server.url, wait_for_instance_seconds=60.0, **PATIENT)
    request = asyncio.ensure_future(front.post(ask(*map(image, [RED, BLUE][: 1 + others]))))
    await asyncio.wait_for(encoder.arrived.acquire(), 60)
    await encoder.kill()
    await front.until(encoder, "unhealthy")
    async with asyncio.timeout(60):
        while not await questions(front, "answered"):
            pass  # each look takes a turn of its own
    if others:
        encoder.answer = encode
        await encoder.start()
        await asyncio.wait_for(encoder.arrived.acquire(), 60)
    has_all.set()
    assert (await request).status == 200
    assert [[part["uuid"] for part in one.parts] for one in encoder.received[1:]] == [[name_of(BLUE)]] * others


async def test_the_store_is_asked_also_when_the_language_instance_was_away(
    start: Start, server: StoreServer, pd: FakeInstance
) -> None:
    front = await start([pd], store=server.url, wait_for_instance_seconds=60.0)
    await pd.kill()
    await front.until(pd, "unhealthy")
    request = asyncio.ensure_future(front.post(ask(image(RED))))
    async with asyncio.timeout(60):
        while await front.metric('chiasm_proxy_requests_waiting{reason="instance"}') != 1:
            pass  # each look takes a turn of its own
    await pd.start()
    assert (await request).status == 200


async def test_a_request_goes_on_without_an_answer_of_the_store(
    start: Start, server: StoreServer, encoder: FakeInstance, pd: FakeInstance
) -> None:
    front = await start([encoder, pd], store=server.url)
    server.freeze()
    try:
        for _ in range(3):
            assert (await front.post(ask(image(RED)))).status == 200
    finally:
        server.thaw()
    assert len(encoder.received) == 3
    assert sum([await questions(front, outcome) for outcome in ("late", "paused")]) == 3


async def test_a_store_that_is_down_is_not_asked_again_at_once(
    start: Start, encoder: FakeInstance, pd: FakeInstance
) -> None:
    front = await start([encoder, pd], store="redis://127.0.0.1:1", **PATIENT)
    for _ in range(2):
        assert (await front.post(ask(image(RED)))).status == 200
    assert len(encoder.received) == 2
    assert await questions(front, "paused") >= 1


@pytest.mark.parametrize("health", [{"reads_stored": False}, {"takes_image_size": False}])
async def test_instances_that_cannot_use_a_store_get_what_encoders_make(
    start: Start, server: StoreServer, encoder: FakeInstance, pd: FakeInstance, health: dict[str, bool]
) -> None:
    other = FakeInstance("pd", **({"reads_stored": True} | health))
    front = await start([encoder, pd, other], store=server.url, **PATIENT)
    assert (await front.post(ask(image(RED)))).status == 200
    assert len(encoder.received) == 1
    assert await questions(front, "answered") == 0
    assert await front.metric("chiasm_proxy_store_used") == 0
