"""Language instances are told where the embeddings are that they need, or will be."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web
from msgspec.structs import replace

from chiasm.proxy import lost_embeddings, places
from chiasm.wire import Costs, ECPlace, ImageCost

from .conftest import Start, ask, image, image_bytes, listen, until_idle
from .instances import (
    SAID,
    Answering,
    FakeInstance,
    Received,
    after,
    chat,
    decode,
    decode_until,
    encode,
    in_order,
    lose,
    never,
    once,
    prefill,
    vllm_decode,
    vllm_prefill,
    when,
)

PEER: dict[str, Any] = {"ec_connector": "SharedMemoryConnector", "ec_store": ""}
PLACES = [ECPlace(host="10.0.0.1", port=4000 + n, engine_id=f"engine {n}") for n in range(3)]


def encoder(number: int = 0) -> FakeInstance:
    """An encoder that serves embeddings from its memory."""
    return FakeInstance("encoder", ec_place=PLACES[number], **PEER)


def pd() -> FakeInstance:
    return FakeInstance("pd", **PEER)


def when_told(answer: Answering = chat) -> Answering:
    """Answer when the instance knows the places of all embeddings that it needs."""

    async def wait(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await instance.until_heard(lambda: set(received.identifiers) <= set(instance.places))
        return await answer(instance, request, received)

    return wait


async def test_an_image_goes_to_another_encoder_if_the_instance_cannot_reach_the_first(start: Start) -> None:
    slow = Costs(images=[ImageCost(pixels=24, encode_seconds=100.0)])
    fast, other, language = encoder(0), FakeInstance("encoder", ec_place=PLACES[1], costs=slow, **PEER), pd()
    is_reached = asyncio.Event()

    async def publish(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        language.awaited = received.identifiers if instance is fast else []
        if instance is other:
            is_reached.set()
        return await encode(instance, request, received)

    fast.answer = other.answer = publish
    language.answer = after(is_reached, chat)
    front = await start([fast, other, language])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert len(fast.received) == 2  # once it may only have been evicted
    assert language.places == {language.received[0].identifiers[0]: PLACES[1]}


@pytest.mark.parametrize("role", ["pd", "prefill"])
async def test_a_request_goes_to_another_instance_if_the_first_reaches_no_encoder(start: Start, role: str) -> None:
    e, languages = encoder(), [FakeInstance(role, **PEER), FakeInstance(role, **PEER)]
    others = [FakeInstance("decode", **PEER)] if role == "prefill" else []

    async def cut_off(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        instance.awaited = received.identifiers
        return await never(instance, request, received)

    once(cut_off, when_told(prefill if others else chat), *languages)
    front = await start([e, *languages, *others])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert [len(one.received) for one in languages] == [1, 1]
    await until_idle(front)


async def test_a_request_goes_to_another_instance_if_what_is_on_its_way_to_the_first_never_arrives(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_embeddings, "_CUT_OFF_IN_ALL", 2)
    e, languages = encoder(), [pd(), pd()]

    async def cut_off(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        while True:  # every second question finds it on its way
            instance.awaited = [] if instance.awaited else received.identifiers
            await instance.asked.acquire()

    once(cut_off, when_told(), *languages)
    front = await start([e, *languages])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert [len(one.received) for one in languages] == [1, 1]


async def test_a_pd_is_told_the_place_before_an_image_is_encoded(start: Start) -> None:
    e, language = encoder(), pd()

    async def after_pd(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await language.until_heard(lambda: bool(language.told))
        return await encode(instance, request, received)

    e.answer = after_pd
    front = await start([e, language])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert language.places == {language.received[0].identifiers[0]: PLACES[0]}
    assert await front.metric('chiasm_proxy_places_total{outcome="told"}') == 1


async def test_all_images_that_go_to_an_encoder_together_are_told_in_one_message(start: Start) -> None:
    e, language = encoder(), pd()
    language.answer = when_told()
    front = await start([e, language])
    colours = [image(image_bytes(colour)) for colour in ("red", "green", "blue")]
    assert (await front.post(ask(*colours))).status == 200
    (message,) = language.told
    assert set(message.places) == set(language.received[0].identifiers)


async def test_nothing_is_told_of_embeddings_that_lie_in_a_common_store(start: Start) -> None:
    e, language = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([e, language])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    await until_idle(front)
    assert language.told == []


async def test_every_instance_that_needs_an_image_is_told_where_it_is(start: Start) -> None:
    """The second request joins the encoding that the first one began."""
    e, languages, gate = encoder(), [pd(), pd()], asyncio.Event()
    e.answer = after(gate, encode)
    for one in languages:
        one.answer = after(gate, when_told())
    front = await start([e, *languages])
    requests = [asyncio.ensure_future(front.post(ask(text, image(image_bytes())))) for text in "ab"]
    for one in languages:
        await one.until_heard(lambda one=one: bool(one.told))  # type: ignore[misc]
    gate.set()
    assert [(await one).status for one in requests] == [200, 200]
    assert [list(one.places.values()) for one in languages] == [[PLACES[0]]] * 2
    assert len(e.received) == 1


async def test_an_image_that_is_published_already_is_told_at_once(start: Start) -> None:
    e, languages = encoder(), [pd(), pd()]
    front = await start([e, *languages])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    first = next(one for one in languages if one.received)
    (other,) = (one for one in languages if one is not first)
    other.answer = when_told()
    await first.kill()
    await front.until(first, "unhealthy")
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert list(other.places.values()) == [PLACES[0]]


async def test_an_image_that_was_published_by_an_encoder_goes_there_again(start: Start) -> None:
    encoders, language = [encoder(n) for n in range(3)], pd()
    front = await start([*encoders, language])
    for _ in range(4):
        for colour in ("red", "green", "blue"):
            assert (await front.post(ask(image(image_bytes(colour))))).status == 200
    received = [name for one in encoders for name in {name for call in one.received for name in call.identifiers}]
    assert len(received) == len(set(received)) == 3


async def test_what_another_encoder_must_encode_is_told_anew(start: Start) -> None:
    encoders, language = [encoder(0), encoder(1)], pd()
    language.answer = after_places(2)
    once(lose, encode, *encoders)
    front = await start([*encoders, language])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    used = [PLACES[encoders.index(one)] for one in encoders if one.received]
    assert set(used) == {PLACES[0], PLACES[1]}
    (told_last,) = language.told[-1].places.values()
    (told_first,) = language.told[0].places.values()
    assert {told_first, told_last} == set(used)


def after_places(count: int, answer: Answering = chat) -> Answering:
    """Answer when the instance has had this many messages about places."""

    async def wait(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await instance.until_heard(lambda: len(instance.told) >= count)
        return await answer(instance, request, received)

    return wait


async def test_an_embedding_that_is_gone_with_its_encoder_is_encoded_by_another_which_is_told(start: Start) -> None:
    """It was published, and the PD had not read it yet."""
    encoders, language = [encoder(0), encoder(1)], pd()
    language.answer = after_places(2)

    async def publish(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        language.awaited = received.identifiers
        return await encode(instance, request, received)

    async def publish_again(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        language.awaited = []
        return await encode(instance, request, received)

    once(publish, publish_again, *encoders)
    front = await start([*encoders, language])
    request = asyncio.ensure_future(front.post(ask(image(image_bytes()))))
    while await front.metric('chiasm_proxy_items_total{outcome="encoded"}') < 1:
        pass
    (gone,) = (one for one in encoders if one.received)
    await gone.kill()
    assert (await request).status == 200
    (other,) = (one for one in encoders if one is not gone)
    assert list(language.places.values()) == [PLACES[encoders.index(other)]]
    assert await front.metric("chiasm_proxy_embeddings_lost_total") == 1


async def test_an_instance_that_takes_over_a_request_is_told_what_is_published_already(start: Start) -> None:
    e, languages, lost = encoder(), [pd(), pd()], asyncio.Event()

    async def lose_it(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        while await front.metric('chiasm_proxy_items_total{outcome="encoded"}') < 1:
            pass
        lost.set()
        return await lose(instance, request, received)

    once(lose_it, when_told(), *languages)
    front = await start([e, *languages])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert lost.is_set()
    assert [list(one.places.values()) for one in languages] == [[PLACES[0]]] * 2
    assert len(e.received) == 1


async def test_a_prompt_that_is_prefilled_again_is_told_of(start: Start) -> None:
    """By then its image was freed, and the encoder's call had long ended."""
    e = encoder()
    prefills = [FakeInstance("prefill", **PEER) for _ in range(2)]
    d = FakeInstance("decode", **(PEER | {"ec_connector": ""}))
    seen = asyncio.Event()
    once(decode_until(3, when(seen)), decode, d)
    in_order([when_told(prefill)], when_told(prefill), *prefills)
    front = await start([e, *prefills, d])
    heard = await listen(front, ask(image(image_bytes()), stream=True), {3: seen})
    assert heard.text == SAID
    assert sum(len(one.received) for one in prefills) == 2
    assert all(one.places for one in prefills if one.received)
    assert len(e.received) == 1


async def test_a_message_that_fails_is_sent_again(start: Start) -> None:
    e, language, gate = encoder(), pd(), asyncio.Event()
    e.answer, language.answer, language.places_status = after(gate, encode), when_told(), 0
    front = await start([e, language])
    request = asyncio.ensure_future(front.post(ask(image(image_bytes()))))
    await language.until_heard(lambda: bool(language.messages))
    language.places_status = 204
    gate.set()
    assert (await request).status == 200
    assert len(language.told) == 1
    assert await front.metric('chiasm_proxy_places_total{outcome="untold"}') == 0


async def test_an_embedding_of_which_an_instance_could_not_be_told_counts_as_lost(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_ATTEMPTS", 1)
    e, language = encoder(), pd()
    language.answer, language.places_status = when_told(), 503

    async def publish(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await language.until_heard(lambda: language.messages >= len(e.received))
        language.places_status = 204
        language.awaited = [] if language.told else received.identifiers
        return await encode(instance, request, received)

    e.answer = publish
    front = await start([e, language])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert (language.messages, len(language.told)) == (2, 1)
    assert await front.metric("chiasm_proxy_embeddings_lost_total") == 1
    assert await front.metric('chiasm_proxy_places_total{outcome="untold"}') == 1


async def test_what_an_instance_is_just_being_told_of_is_not_lost(start: Start) -> None:
    """It says that it awaits the embedding, because the message is on its way; so nothing is encoded again."""
    e, language, slow = encoder(), pd(), asyncio.Event()

    async def publish(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        language.awaited = received.identifiers
        return await encode(instance, request, received)

    async def after_questions(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        async with asyncio.timeout(60):
            for _ in range(3):
                await instance.asked.acquire()
        language.awaited = []
        slow.set()
        return await when_told()(instance, request, received)

    e.answer, language.answer = publish, after_questions
    language.hears = slow
    front = await start([e, language])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert len(e.received) == 1
    assert await front.metric("chiasm_proxy_embeddings_lost_total") == 0


async def test_a_fleet_moves_embeddings_with_one_connector(start: Start) -> None:
    front = await start([encoder(), FakeInstance("pd")])
    answer = await front.get("/health")
    reasons = [one["reason"] for one in answer.json["instances"]]
    assert "it moves embeddings with SharedMemoryConnector, but the fleet with SharedStorageConnector" in reasons


async def test_an_instance_that_never_hears_holds_up_nobody(start: Start) -> None:
    e, language = encoder(), pd()
    language.hears = asyncio.Event()
    front = await start([e, language])
    for colour in ("red", "green"):
        assert (await front.post(ask(image(image_bytes(colour))))).status == 200
    assert language.told == []


async def test_a_decode_instance_is_told_if_it_has_a_connector(start: Start) -> None:
    """vLLM's decode instances compute a prompt again when they are short of blocks, and then read its embeddings."""
    e, p, d = encoder(), vllm_prefill(), vllm_decode()
    for one in (p, d):
        assert one.health is not None
        one.health = replace(one.health, **PEER)
    d.answer = when_told(d.answer)
    front = await start([e, p, d])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert d.places == p.places == {p.received[0].identifiers[0]: PLACES[0]}


async def test_a_decode_instance_without_a_connector_is_told_nothing(start: Start) -> None:
    e, p, d = encoder(), FakeInstance("prefill", **PEER), FakeInstance("decode", ec_store="")
    front = await start([e, p, d])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    await until_idle(front)
    assert (list(p.places.values()), d.told) == ([PLACES[0]], [])
