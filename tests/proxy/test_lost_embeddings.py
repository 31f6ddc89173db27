"""An embedding that is lost before it was read is encoded again, while the request waits where it is."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from chiasm.proxy import lost_embeddings

from .conftest import Start, ask, image, image_bytes, listen, until_idle, when_encoded
from .instances import (
    SAID,
    VLLM,
    WORDS,
    Answering,
    FakeInstance,
    Received,
    begin_stream,
    chat,
    decode,
    decode_of_vllm,
    decode_until,
    encode,
    end_of_stream,
    event,
    never,
    once,
    only_a_head,
    prefill,
    prefill_of_vllm,
    refuse,
    role_event,
    when,
)


def lose(encoder: FakeInstance, reader: FakeInstance, answer: Answering = chat, *, times: int = 1) -> None:
    """Have the embeddings of the encoder's first calls get lost; ``reader`` answers when those of the next are there."""
    is_read = asyncio.Event()

    async def publish(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        is_last = len(instance.received) > times
        reader.awaited = [] if is_last else received.identifiers
        if is_last:
            is_read.set()
        return await encode(instance, request, received)

    async def wait(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await is_read.wait()
        return await answer(instance, request, received)

    encoder.answer, reader.answer = publish, wait


async def after_questions(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
    """Answer as a PD when it was asked some times for what it awaits."""
    async with asyncio.timeout(60):
        for _ in range(3):
            await instance.asked.acquire()
    return await chat(instance, request, received)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_lost_embedding_is_encoded_again(start: Start, stream: bool) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    lose(encoder, pd, times=2)
    front = await start([encoder, pd])
    assert (await front.post(ask(image(image_bytes()), stream=stream))).status == 200
    assert [one.identifiers for one in encoder.received] == [encoder.received[0].identifiers] * 3
    assert len(pd.received) == 1  # it kept its place
    assert await front.metric("chiasm_proxy_embeddings_lost_total") == 2
    await until_idle(front)


async def test_only_what_is_lost_is_encoded_again(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    lose(encoder, pd)
    publish = encoder.answer

    async def lose_one(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        answer = await publish(instance, request, received)
        pd.awaited = pd.awaited[1:] if pd.awaited else []
        return answer

    encoder.answer = lose_one
    front = await start([encoder, pd])
    assert (await front.post(ask(image(image_bytes("red")), image(image_bytes("blue"))))).status == 200
    first, second = encoder.received
    assert second.identifiers == first.identifiers[1:]


@pytest.mark.parametrize("said", [b"no JSON", b'{"identifiers": ["\xff"]}', b'{"x":' + b"[" * 100_000])
async def test_an_instance_that_talks_nonsense_of_what_it_awaits_lacks_nothing(start: Start, said: bytes) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    pd.awaited_body, pd.answer = said, after_questions
    front = await start([encoder, pd])
    assert (await front.post(ask(image(image_bytes())))).status == 200


async def test_what_other_requests_wait_for_is_not_encoded_again(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    pd.awaited, pd.answer = ["f" * 64], after_questions
    front = await start([encoder, pd])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert len(encoder.received) == 1


async def test_what_is_lost_again_and_again_is_an_error_that_says_so(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_embeddings, "_MOST_IN_VAIN", 2)
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    lose(encoder, pd, times=99)
    front = await start([encoder, pd])
    answer = await front.post(ask(image(image_bytes())))
    assert (answer.status, answer.error["code"]) == (503, "embedding_lost")
    assert "--ec-max-bytes" in answer.error["message"]
    assert len(encoder.received) == 3
    await until_idle(front)


async def test_an_encoder_that_cannot_encode_again_ends_the_request(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    lose(encoder, pd, times=99)
    once(encoder.answer, refuse(400, "no image", code="invalid_image"), encoder)
    front = await start([encoder, pd])
    answer = await front.post(ask(image(image_bytes())))
    assert (answer.status, answer.error["code"]) == (400, "invalid_image")
    await asyncio.wait_for(pd.gone.acquire(), 60)


async def test_an_instance_that_does_not_tell_is_waited_for(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    pd.awaited, pd.answer = None, after_questions
    front = await start([encoder, pd])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert len(encoder.received) == 1


async def test_what_the_next_instance_lacks_is_encoded_again(start: Start) -> None:
    """The first one freezes after its embedding was published, and the question that it got about it ends with its calls."""
    encoder, pds = FakeInstance("encoder"), [FakeInstance("pd"), FakeInstance("pd")]
    is_encoded_again = asyncio.Event()

    async def publish(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        while not any(pd.received for pd in pds):
            await front.get("/health")
        (idle,) = [pd for pd in pds if not pd.received]
        (busy,) = [pd for pd in pds if pd is not idle]
        busy.awake.clear()
        idle.awaited = received.identifiers
        return await encode(instance, request, received)

    async def wait(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        if instance.awaited:
            await is_encoded_again.wait()
        return await chat(instance, request, received)

    async def publish_again(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        is_encoded_again.set()
        return await encode(instance, request, received)

    once(publish, publish_again, encoder)
    once(never, wait, *pds)
    front = await start(
        [encoder, *pds],
        probe_timeout_seconds=60.0,
        busy_probe_timeout_seconds=0.3,
        wait_for_instance_seconds=15.0,  # on a busy machine both may seem frozen for a moment
    )
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert len(encoder.received) == 2
    await until_idle(front)


# Prefill and decode.


async def test_prefill_gets_a_lost_embedding_again(start: Start) -> None:
    encoder, p, d = FakeInstance("encoder"), FakeInstance("prefill"), FakeInstance("decode")
    lose(encoder, p, prefill)
    front = await start([encoder, p, d])
    assert (await listen(front, ask(image(image_bytes()), stream=True))).text == SAID
    assert (len(encoder.received), len(p.received)) == (2, 1)


async def test_a_prompt_that_is_prefilled_again_ends_if_its_embedding_is_lost(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its image was freed when the answer began."""
    monkeypatch.setattr(lost_embeddings, "_SURELY_LOST_SECONDS", 0.0)
    encoder, p, d = FakeInstance("encoder"), FakeInstance("prefill"), FakeInstance("decode")
    seen = asyncio.Event()
    once(decode_until(3, when(seen)), decode, d)

    async def lack(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        p.awaited = received.identifiers
        return await never(instance, request, received)

    once(prefill, lack, p)
    front = await start([encoder, p, d])
    heard = await listen(front, ask(image(image_bytes()), stream=True), {3: seen})
    assert heard.error is not None
    assert heard.error["code"] == "embedding_lost"
    assert len(encoder.received) == 1
    await until_idle(front)


# Decode instances that compute prompts again.


def recomputing_fleet() -> tuple[FakeInstance, FakeInstance, FakeInstance]:
    """An encoder, and prefill and decode of vLLM with a connector: decode computes a prompt again whose KV it has lost."""
    encoder = FakeInstance("encoder", ec_connector="SharedStorageConnector")
    p, d = (FakeInstance(role, **VLLM, ec_connector="SharedStorageConnector") for role in ("prefill", "decode"))
    p.answer, d.answer = prefill_of_vllm, decode_of_vllm
    return encoder, p, d


def lack_after_a_word(until: asyncio.Event) -> Answering:
    """Answer as decode that needs its embeddings again after the first word, until this event."""

    async def answer(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        response = await begin_stream(request)
        await response.write(role_event() + event(WORDS[0]))
        instance.awaited = received.identifiers
        await until.wait()
        instance.awaited = []
        for word in WORDS[1:]:
            await response.write(event(word))
        await response.write(end_of_stream())
        return response

    return answer


@pytest.mark.parametrize("stream", [False, True])
async def test_decode_gets_a_lost_embedding_again(start: Start, stream: bool) -> None:
    encoder, p, d = recomputing_fleet()
    lose(encoder, d, decode_of_vllm, times=2)
    front = await start([encoder, p, d])
    p.answer = when_encoded(front, prefill_of_vllm)
    assert (await front.post(ask(image(image_bytes()), stream=stream))).status == 200
    assert [one.identifiers for one in encoder.received] == [encoder.received[0].identifiers] * 3
    assert [len(one.received) for one in (p, d)] == [1, 1]
    assert await front.metric("chiasm_proxy_embeddings_lost_total") == 2
    await until_idle(front)


def lose_late(encoder: FakeInstance, decode: FakeInstance, *, times: int) -> None:
    """Have embeddings get lost that are published after prefill has answered, since it had the image's prefix in its cache."""
    lose(encoder, decode, decode_of_vllm, times=times)
    publish = encoder.answer

    async def publish_late(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        if len(instance.received) == 1:
            await decode.arrived.acquire()
        return await publish(instance, request, received)

    encoder.answer = publish_late


@pytest.mark.parametrize("stream", [False, True])
async def test_decode_gets_an_embedding_again_that_is_lost_after_prefill_has_answered(
    start: Start, stream: bool
) -> None:
    encoder, p, d = recomputing_fleet()
    lose_late(encoder, d, times=2)
    front = await start([encoder, p, d])
    assert (await front.post(ask(image(image_bytes()), stream=stream))).status == 200
    assert [len(one.received) for one in (encoder, p, d)] == [3, 1, 1]
    await until_idle(front)


async def test_an_embedding_that_stays_lost_after_prefill_has_answered_ends_the_request(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_embeddings, "_MOST_IN_VAIN", 2)
    encoder, p, d = recomputing_fleet()
    lose_late(encoder, d, times=1000)
    front = await start([encoder, p, d])
    answer = await front.post(ask(image(image_bytes())))
    assert answer.error["code"] == "embedding_lost"
    await until_idle(front)


async def test_a_lost_decode_instance_costs_a_prefill_with_the_images_that_are_still_there(start: Start) -> None:
    encoder, p, d = recomputing_fleet()
    once(only_a_head, decode_of_vllm, d)
    front = await start([encoder, p, d])
    assert (await listen(front, ask(image(image_bytes()), stream=True))).text == SAID
    assert [len(one.received) for one in (encoder, p, d)] == [1, 2, 2]
    await until_idle(front)


async def test_an_encoder_that_fails_after_prefill_has_answered_costs_nothing(start: Start) -> None:
    """Prefill had the image's prefix in its cache, and needed no embedding."""
    encoder, p, d = recomputing_fleet()
    has_failed = asyncio.Event()

    async def fail_late(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await d.arrived.acquire()
        has_failed.set()
        return await refuse(400, "no image", code="invalid_image")(instance, request, received)

    async def answer_later(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await has_failed.wait()
        for _ in range(3):  # so that the proxy has heard of it
            await front.get("/health")
        return await decode_of_vllm(instance, request, received)

    encoder.answer, d.answer = fail_late, answer_later
    front = await start([encoder, p, d])
    assert (await listen(front, ask(image(image_bytes()), stream=True))).text == SAID
    await until_idle(front)


async def test_a_stream_whose_embedding_stays_lost_at_decode_ends_with_an_error(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_embeddings, "_SURELY_LOST_SECONDS", 0.0)
    encoder, p, d = recomputing_fleet()
    d.answer = lack_after_a_word(asyncio.Event())
    front = await start([encoder, p, d])
    p.answer = when_encoded(front, prefill_of_vllm)
    heard = await listen(front, ask(image(image_bytes()), stream=True))
    assert heard.text == WORDS[0]
    assert heard.error is not None
    assert heard.error["code"] == "embedding_lost"
    await asyncio.wait_for(d.gone.acquire(), 60)
    await until_idle(front)


async def test_a_stream_goes_on_when_decode_lacks_an_embedding_only_for_a_while(start: Start) -> None:
    encoder, p, d = recomputing_fleet()
    is_there = asyncio.Event()
    d.answer = lack_after_a_word(is_there)
    front = await start([encoder, p, d])
    p.answer = when_encoded(front, prefill_of_vllm)
    heard = asyncio.create_task(listen(front, ask(image(image_bytes()), stream=True)))
    async with asyncio.timeout(60):
        while not d.awaited:  # noqa: ASYNC110 - the instance has no event for it
            await asyncio.sleep(0.01)
        for _ in range(2):
            await d.asked.acquire()
    is_there.set()
    assert (await heard).text == SAID
    assert [len(one.received) for one in (encoder, p, d)] == [1, 1, 1]
    await until_idle(front)
