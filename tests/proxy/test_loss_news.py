"""An instance says by itself that an embedding is lost, and isn't asked at intervals."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from aiohttp import web

from chiasm.proxy import lost_embeddings

from .conftest import Start, ask, image, image_bytes, listen, until_idle, when_encoded
from .instances import (
    SAID,
    VLLM,
    Answering,
    FakeInstance,
    Received,
    after,
    chat,
    decode_of_vllm,
    never,
    once,
    prefill,
    prefill_of_vllm,
)
from .test_lost_embeddings import lose


@pytest.fixture
def asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first question at an interval, the next one comes after the end of the test."""
    for name in ("_GROWTH", "_LONGEST_WAIT_SECONDS", "_LONGEST_WAIT_FOR_NEWS_SECONDS"):
        monkeypatch.setattr(lost_embeddings, name, 10_000.0)


def teller(role: str = "pd") -> FakeInstance:
    return FakeInstance(role, tells_lost=True)


async def asked(instance: FakeInstance, number: int = 1) -> list[str]:
    """Return what a question names that waits at an instance: the one with this number, counted from 1."""
    await instance.until(lambda: len(instance.questions) >= number)
    return instance.questions[number - 1].published


def lacking(encoder: FakeInstance, answer: Answering = chat, *, times: int = 1) -> Answering:
    """Answer as an instance that finds its embeddings lost while a question waits, until they are encoded again."""

    async def lack(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        for number in range(1, times + 1):
            instance.awaited = await asked(instance, number)
            await encoder.until(lambda: len(encoder.received) > number)  # noqa: B023
            instance.awaited = []
        return await answer(instance, request, received)

    return lack


@pytest.mark.usefixtures("asked_once")
@pytest.mark.parametrize("times", [1, 2])
async def test_what_is_lost_while_a_question_waits_is_encoded_again(start: Start, times: int) -> None:
    encoder, pd = FakeInstance("encoder"), teller()
    pd.answer = lacking(encoder, times=times)
    front = await start([encoder, pd])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert [one.identifiers for one in encoder.received] == [pd.questions[0].published] * (1 + times)
    assert len(pd.received) == 1  # it kept its place
    assert await front.metric("chiasm_proxy_embeddings_lost_total") == times
    await until_idle(front)


@pytest.mark.usefixtures("asked_once")
async def test_prefill_says_what_is_lost(start: Start) -> None:
    encoder, p, d = FakeInstance("encoder"), teller("prefill"), FakeInstance("decode")
    p.answer = lacking(encoder, prefill)
    front = await start([encoder, p, d])
    assert (await listen(front, ask(image(image_bytes()), stream=True))).text == SAID
    assert (len(encoder.received), len(p.received)) == (2, 1)


@pytest.mark.usefixtures("asked_once")
async def test_a_decode_instance_that_reads_embeddings_says_what_is_lost(start: Start) -> None:
    encoder = FakeInstance("encoder", ec_connector="SharedStorageConnector")
    p, d = (FakeInstance(role, **VLLM, ec_connector="SharedStorageConnector") for role in ("prefill", "decode"))
    assert d.health is not None
    d.health = msgspec.structs.replace(d.health, tells_lost=True)
    d.answer = lacking(encoder, decode_of_vllm)
    front = await start([encoder, p, d])
    p.answer = when_encoded(front, prefill_of_vllm)
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert (len(encoder.received), len(d.received)) == (2, 1)


@pytest.mark.usefixtures("asked_once")
async def test_what_is_published_while_a_question_waits_is_in_the_next_which_ends_it(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), teller()
    is_lost = asyncio.Event()
    pd.answer = after(is_lost, chat)
    front = await start([encoder, pd])
    answers = [asyncio.create_task(front.post(ask(image(image_bytes("red")))))]
    (first,) = await asked(pd)
    answers.append(asyncio.create_task(front.post(ask(image(image_bytes("blue"))))))
    both = await asked(pd, 2)
    await pd.until(lambda: pd.waiting_questions == 1)
    (second,) = {*both} - {first}
    pd.awaited = [second]
    await encoder.until(lambda: len(encoder.received) == 3)
    pd.awaited = []
    is_lost.set()
    assert [(await answer).status for answer in answers] == [200, 200]
    assert [one.identifiers for one in encoder.received] == [[first], [second], [second]]
    await until_idle(front)


@pytest.mark.usefixtures("asked_once")
async def test_all_requests_that_wait_for_one_embedding_hear_of_its_loss(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), teller()
    is_there = asyncio.Event()
    pd.answer = after(is_there, chat)
    front = await start([encoder, pd])
    answers = [asyncio.create_task(front.post(ask(image(image_bytes())))) for _ in range(3)]
    await pd.until(lambda: len(pd.received) == 3)
    pd.awaited = await asked(pd)
    calls = len(encoder.received)
    await encoder.until(lambda: len(encoder.received) > calls)
    pd.awaited = []
    is_there.set()
    assert [(await answer).status for answer in answers] == [200] * 3
    await until_idle(front)


async def test_what_was_told_and_has_come_meanwhile_is_not_encoded_again(start: Start) -> None:
    """The word of a question is only news: what the instance awaits is asked."""
    encoder, pd = FakeInstance("encoder"), teller()

    async def mistake(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        instance.mistakes = await asked(instance)
        instance.awaited = []  # which has it look again
        await asked(instance, 2)
        instance.mistakes = []
        return await chat(instance, request, received)

    pd.answer = mistake
    front = await start([encoder, pd])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert len(encoder.received) == 1


async def test_an_instance_that_lets_no_question_wait_is_asked_at_intervals(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), teller()
    pd.lets_wait = False
    lose(encoder, pd)
    publish = encoder.answer

    async def publish_and_keep(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        answer = await publish(instance, request, received)
        if len(instance.received) == 1:
            lost, pd.awaited = pd.awaited, []

            async def lose_later() -> None:
                await asked(pd)
                for _ in range(3):
                    await pd.asked.acquire()
                pd.awaited = lost

            tasks.append(asyncio.create_task(lose_later()))
        return answer

    tasks: list[asyncio.Task[None]] = []
    encoder.answer = publish_and_keep
    front = await start([encoder, pd])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert len(encoder.received) == 2
    assert len(pd.questions) == 1  # it isn't asked in vain again and again


async def test_an_older_instance_gets_no_question_that_waits(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    lose(encoder, pd, times=2)
    front = await start([encoder, pd])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert len(encoder.received) == 3
    assert pd.questions == []


async def test_a_question_ends_with_the_proxy(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), teller()
    pd.answer = never
    front = await start([encoder, pd])
    answer = asyncio.create_task(front.post(ask(image(image_bytes()))))
    await asked(pd)
    await front.stop()
    await pd.until(lambda: pd.waiting_questions == 0)
    await answer


@pytest.mark.usefixtures("asked_once")
async def test_the_instance_that_takes_over_a_request_is_asked(start: Start) -> None:
    encoder, pds = FakeInstance("encoder"), [teller(), teller()]

    async def die(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await asked(instance)
        await instance.kill()
        raise AssertionError("the connection is closed")

    once(die, lacking(encoder), *pds)
    front = await start([encoder, *pds])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert [len(pd.received) for pd in pds] == [1, 1]
    assert len(encoder.received) == 2
    await until_idle(front)
