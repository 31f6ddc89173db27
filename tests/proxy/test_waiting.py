"""Requests that wait: for an instance that is expected back, and for room at full ones."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web

from chiasm.http.config import HttpConfig
from chiasm.proxy.waiting import WaitingLine
from chiasm.tasks import end_tasks

from .conftest import GIVES_UP_SECONDS, Front, Start, ask, image, image_bytes, listen, until_idle
from .instances import (
    WORDS,
    Answering,
    FakeInstance,
    Received,
    break_off,
    chat,
    decode,
    decode_until,
    never,
    refuse,
)

FULL = refuse(503, "The queue is full.", kind="overloaded_error", code="too_many_requests")
WAITING = 'chiasm_proxy_requests_waiting{reason="instance"}'
FOR_ROOM = 'chiasm_proxy_requests_waiting{reason="room"}'
WAITS = {"wait_for_instance_seconds": 15.0}


def fleet_with(role: str) -> tuple[FakeInstance, list[FakeInstance], Any]:
    """An instance of a role, the others that it takes to answer, and a body that needs it."""
    one = FakeInstance(role)
    match role:
        case "encoder":
            return one, [FakeInstance("pd")], ask("x", image(image_bytes()))
        case "prefill":
            return one, [FakeInstance("decode")], ask("x")
        case "decode":
            return one, [FakeInstance("prefill")], ask("x")
    return one, [], ask("x")


ROLES = pytest.mark.parametrize("role", ["encoder", "pd", "aggregated", "prefill", "decode"])


async def until_waiting(front: Front, count: int = 1, name: str = WAITING) -> None:
    async with asyncio.timeout(60):
        while await front.metric(name) != count:
            pass


# For an instance


@ROLES
async def test_a_request_waits_for_the_only_instance_that_was_just_lost(start: Start, role: str) -> None:
    one, others, body = fleet_with(role)
    front = await start([one, *others], **WAITS)
    await one.kill()
    await front.until(one, "unhealthy")
    request = asyncio.ensure_future(front.post(body))
    await until_waiting(front)
    await one.start()
    assert (await request).status == 200
    assert await front.metric(WAITING) == 0


@ROLES
async def test_a_request_waits_for_the_only_instance_that_was_lost_over_it(start: Start, role: str) -> None:
    one, others, body = fleet_with(role)
    usual, one.answer = one.answer, never
    if role == "encoder":
        others[0].answer = when_encoded(one)
    front = await start([one, *others], **WAITS)
    request = asyncio.ensure_future(front.post(body))
    await one.arrived.acquire()
    await one.kill()
    await front.until(one, "unhealthy")
    one.answer = usual
    await one.start()
    assert (await request).status == 200
    assert len(one.received) == 2
    await until_idle(front)


def when_encoded(encoder: FakeInstance) -> Answering:
    """Answer as a PD that needs what an encoder publishes in its second call."""

    async def answer(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        while len(encoder.received) < 2:
            await encoder.arrived.acquire()
        return await chat(instance, request, received)

    return answer


@ROLES
async def test_a_request_waits_for_the_only_instance_that_is_still_starting(start: Start, role: str) -> None:
    one, others, body = fleet_with(role)
    one.health_status = 503
    front = await start([one, *others], **WAITS)
    request = asyncio.ensure_future(front.post(body))
    await until_waiting(front)
    one.health_status = 200
    assert (await request).status == 200


@ROLES
async def test_a_request_waits_for_the_only_instance_that_is_stopping(start: Start, role: str) -> None:
    """It refuses before a probe has shown that it stops."""
    one, others, body = fleet_with(role)
    usual = one.answer

    async def stop(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        one.health_status, one.answer = 503, usual
        return await refuse(503, "stopping", kind="overloaded_error", code="stopping")(instance, request, received)

    one.answer = stop
    if role == "encoder":
        others[0].answer = when_encoded(one)
    front = await start([one, *others], probe_interval_seconds=60, **WAITS)
    request = asyncio.ensure_future(front.post(body))
    await front.until(one, "unhealthy")
    one.health_status = 200
    assert (await request).status == 200
    await until_idle(front)


async def test_a_stream_that_has_begun_waits_for_the_only_decode_instance(start: Start) -> None:
    p, d, lost = FakeInstance("prefill"), FakeInstance("decode"), asyncio.Event()

    async def go(request: web.Request, response: web.StreamResponse) -> None:
        d.answer = decode
        lost.set()
        await break_off(request)

    d.answer = decode_until(4, go)
    front = await start([p, d], **WAITS)
    request = asyncio.ensure_future(listen(front, ask("x", stream=True)))
    await lost.wait()
    await d.kill()
    await front.until(d, "unhealthy")
    await d.start()
    heard = await request
    assert (heard.words, heard.ended) == (list(WORDS), True)


@ROLES
async def test_nobody_waits_while_another_instance_is_healthy(start: Start, role: str) -> None:
    one, others, body = fleet_with(role)
    lost = FakeInstance(role)
    lost.answer = one.answer = never
    front = await start([one, lost, *others], **WAITS)
    await lost.kill()
    await front.until(lost, "unhealthy")
    request = asyncio.ensure_future(front.post(body))
    await asyncio.wait_for(one.arrived.acquire(), 60)
    assert await front.metric(WAITING) == 0
    await end_tasks(request)


async def test_images_go_to_an_aggregated_instance_rather_than_wait_for_an_encoder(start: Start) -> None:
    encoder, pd, aggregated = FakeInstance("encoder"), FakeInstance("pd"), FakeInstance("aggregated")
    front = await start([encoder, pd, aggregated], **WAITS)
    await encoder.kill()
    await front.until(encoder, "unhealthy")
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert (len(pd.received), len(aggregated.received)) == (0, 1)


async def test_nor_do_images_wait_whose_encoder_is_lost(start: Start) -> None:
    encoder, pd, aggregated = FakeInstance("encoder"), FakeInstance("pd"), FakeInstance("aggregated")
    encoder.answer = pd.answer = never
    front = await start([encoder, pd, aggregated], **WAITS)
    requests = []
    for n in range(1, 9):
        requests.append(asyncio.ensure_future(front.post(ask(image(image_bytes(size=(5, n)))))))
    await asyncio.wait_for(encoder.arrived.acquire(), 60)
    await encoder.kill()
    await front.until(encoder, "unhealthy")
    assert [answer.status for answer in await asyncio.gather(*requests)] == [200] * 8
    assert await front.metric("chiasm_proxy_language_retries_total") >= 1


async def test_images_whose_pd_is_lost_go_to_an_aggregated_instance(start: Start) -> None:
    encoder, pd, aggregated = FakeInstance("encoder"), FakeInstance("pd"), FakeInstance("aggregated")
    encoder.answer = never

    async def go(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await encoder.arrived.acquire()
        await pd.kill()
        raise AssertionError

    pd.answer = go
    front = await start([encoder, pd, aggregated], **WAITS)
    for n in range(1, 9):
        assert (await front.post(ask(image(image_bytes(size=(5, n)))))).status == 200
        if pd.received:
            return
    raise AssertionError("no request went to the PD")


@pytest.mark.parametrize(("role", "code"), [("encoder", "no_encoder"), ("pd", "no_pd"), ("decode", "no_decode")])
async def test_waiting_ends(start: Start, role: str, code: str) -> None:
    one, others, body = fleet_with(role)
    front = await start([one, *others], wait_for_instance_seconds=0.3)
    await one.kill()
    await front.until(one, "unhealthy")
    answer = await front.post(body)
    assert (answer.status, answer.error["code"]) == (503, code)
    assert "within 0.3 s" in answer.error["message"]
    assert int(answer.headers["Retry-After"]) > 1


async def test_images_in_the_queue_wait_no_longer(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    encoder.answer = pd.answer = never
    front = await start([encoder, pd], wait_for_instance_seconds=0.3)
    request = asyncio.ensure_future(front.post(ask(image(image_bytes()))))
    await encoder.arrived.acquire()
    await encoder.kill()
    answer = await request
    assert (answer.status, answer.error["code"]) == (503, "encoder_lost")
    assert "within 0.3 s" in answer.error["message"]
    await until_idle(front)


async def test_requests_that_wait_are_bounded(start: Start) -> None:
    pd = FakeInstance("pd")
    front = await start([pd], max_waiting_requests=1, **WAITS)
    await pd.kill()
    await front.until(pd, "unhealthy")
    request = asyncio.ensure_future(front.post(ask("x")))
    await until_waiting(front)
    answer = await front.post(ask("x"))
    assert (answer.status, answer.error["code"]) == (503, "too_many_requests")
    await pd.start()
    assert (await request).status == 200


async def test_what_nothing_could_ever_serve_is_refused_at_once(start: Start) -> None:
    front = await start([FakeInstance("pd")], **WAITS)
    answer = await front.post(ask(image(image_bytes())))
    assert (answer.status, answer.error["code"]) == (503, "no_encoder")
    assert "within" not in answer.error["message"]


async def test_nobody_waits_for_an_instance_that_does_not_fit(start: Start) -> None:
    front = await start([FakeInstance("pd"), FakeInstance("encoder", model="other")], **WAITS)
    answer = await front.post(ask(image(image_bytes())))
    assert (answer.status, answer.error["code"]) == (503, "no_encoder")
    assert "within" not in answer.error["message"]


async def test_a_client_that_leaves_waits_no_more(start: Start) -> None:
    pd = FakeInstance("pd")
    front = await start([pd], **WAITS)
    await pd.kill()
    await front.until(pd, "unhealthy")
    request = asyncio.ensure_future(front.post(ask("x")))
    await until_waiting(front)
    await end_tasks(request)
    await until_waiting(front, 0)


# For room


def with_room(room: int, answer: Answering) -> Answering:
    """Answer so many requests at a time, and refuse others."""
    running = 0

    async def take(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        nonlocal running
        if running >= room:
            return await FULL(instance, request, received)
        running += 1
        try:
            await asyncio.sleep(0.001)
            return await answer(instance, request, received)
        finally:
            running -= 1

    return take


@pytest.mark.parametrize("role", ["pd", "aggregated"])
async def test_a_request_waits_for_a_full_instance(start: Start, role: str) -> None:
    one = FakeInstance(role)
    one.answer = FULL
    front = await start([one])
    request = asyncio.ensure_future(front.post(ask("x")))
    await until_waiting(front, 1, FOR_ROOM)
    one.answer = chat
    assert (await request).status == 200
    assert await front.metric("chiasm_proxy_language_refusals_total") == len(one.received) - 1
    await until_idle(front)


async def test_requests_that_come_put_nobodys_turn_off() -> None:
    line = WaitingLine()
    first, others = asyncio.ensure_future(line.wait()), []
    for _ in range(1000):
        others.append(asyncio.ensure_future(line.wait()))
        await asyncio.sleep(0.001)
    assert first.done()
    await end_tasks(*others)


async def test_calls_that_end_put_off_no_try() -> None:
    """Otherwise the room of an instance that has joined would stay empty as long as calls of the others end often."""
    line, ended = WaitingLine(), 0
    waiting = [asyncio.ensure_future(line.wait()) for _ in range(10_000)]
    while sum(one.done() for one in waiting) <= ended:
        line.advance()
        ended += 1
        await asyncio.sleep(0.001)
    await end_tasks(*waiting)


class Waiting:
    """Requests in a line, and a clock that stands still."""

    def __init__(self, count: int) -> None:
        self.line = WaitingLine()
        self._turns = [asyncio.ensure_future(self.line.wait()) for _ in range(count)]

    async def comes_back(self) -> None:
        self._turns.append(asyncio.ensure_future(self.line.wait(first=True)))
        await asyncio.sleep(0)

    async def tried(self) -> int:
        """Return how many get a turn when the time has come."""
        await asyncio.sleep(0)
        before = sum(turn.done() for turn in self._turns)
        self.line._try()
        await asyncio.sleep(0)
        return sum(turn.done() for turn in self._turns) - before


@pytest.mark.usefixtures("never_tried")
async def test_where_there_is_room_without_a_call_that_ends_more_and_more_try() -> None:
    waiting = Waiting(20)
    assert [await waiting.tried() for _ in range(6)] == [1, 2, 4, 8, 5, 0]


@pytest.mark.usefixtures("never_tried")
async def test_when_one_comes_back_only_one_tries_again() -> None:
    waiting = Waiting(20)
    assert [await waiting.tried() for _ in range(3)] == [1, 2, 4]
    await waiting.comes_back()
    assert [await waiting.tried() for _ in range(3)] == [1, 2, 4]


@pytest.fixture
def never_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time for a try comes only when a test says so."""
    monkeypatch.setattr("chiasm.proxy.waiting._TRY_SECONDS", 1e6)


async def test_a_full_instance_costs_nothing_while_another_has_room(start: Start) -> None:
    pds = [FakeInstance("pd"), FakeInstance("pd")]
    pds[0].answer = FULL
    front = await start([*pds])
    for _ in range(3):
        assert (await front.post(ask("x"))).status == 200
    assert len(pds[1].received) == 3


@pytest.mark.usefixtures("giving_up_early")
@pytest.mark.parametrize("stream", [False, True])
async def test_waiting_for_room_ends_with_an_error_that_says_so(start: Start, stream: bool) -> None:
    pd = FakeInstance("pd")
    pd.answer = FULL
    front = await start([pd], deadline_seconds=GIVES_UP_SECONDS)
    answer = await front.post(ask("x", stream=stream))
    assert (answer.status, answer.error["code"]) == (503, "too_many_requests")
    assert "full" in answer.error["message"]
    assert int(answer.headers["Retry-After"]) >= 1
    await until_idle(front)


@pytest.mark.parametrize("who_checks", ["proxy", "instance"])
async def test_a_key_whose_share_of_the_room_is_taken_keeps_no_other_key_waiting(start: Start, who_checks: str) -> None:
    """An instance keeps room in its queue for others."""
    pd, keys = FakeInstance("pd", needs_key=who_checks == "instance"), ("greedy" * 3, "modest" * 3)

    async def share(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        is_greedy = received.headers["Authorization"] == f"Bearer {keys[0]}"
        return await (FULL if is_greedy else chat)(instance, request, received)

    pd.answer = share
    front = await start([pd], http=HttpConfig(api_key=keys if who_checks == "proxy" else ()))
    greedy, modest = ({"Authorization": f"Bearer {key}"} for key in keys)
    request = asyncio.ensure_future(front.post(ask("x"), **greedy))
    await until_waiting(front, 1, FOR_ROOM)
    assert (await front.post(ask("x"), **modest)).status == 200
    pd.answer = chat
    assert (await request).status == 200


async def test_text_does_not_wait_behind_images_that_only_full_pds_can_take(start: Start) -> None:
    encoder, pd, aggregated = FakeInstance("encoder"), FakeInstance("pd"), FakeInstance("aggregated")
    pd.answer = FULL
    front = await start([encoder, pd], admin_key="k" * 16)
    images = asyncio.ensure_future(front.post(ask(image(image_bytes()))))
    await until_waiting(front, 1, FOR_ROOM)
    await aggregated.start()
    assert (await front.post({"url": aggregated.url, "role": "aggregated"}, "/instances", **front.admin)).status == 201
    await front.until(aggregated, "healthy")
    assert (await front.post(ask("x"))).status == 200
    pd.answer = chat
    assert (await images).status == 200
    await aggregated.kill()


async def test_kinds_take_turns_and_those_of_one_kind_come_in_order() -> None:
    line, turns = WaitingLine(), list[str]()

    async def wait(name: str) -> None:
        await line.wait(name[0])
        turns.append(name)

    waiting = [asyncio.ensure_future(wait(name)) for name in ("a1", "a2", "a3", "b1", "b2", "c1")]
    await asyncio.sleep(0)
    for _ in waiting:
        line.advance()
    await asyncio.gather(*waiting)
    assert turns == ["a1", "b1", "c1", "a2", "b2", "a3"]


async def test_another_refusal_is_for_the_client(start: Start) -> None:
    pd = FakeInstance("pd")
    pd.answer = refuse(503, "no store", kind="storage_error")
    front = await start([pd])
    answer = await front.post(ask("x"))
    assert (answer.status, answer.error["message"]) == (503, "no store")
    assert len(pd.received) == 1


@pytest.mark.parametrize("role", ["pd", "aggregated", "prefill"])
async def test_a_burst_of_300_with_room_for_32_is_served(start: Start, role: str) -> None:
    encoder, one, d = FakeInstance("encoder"), FakeInstance(role), FakeInstance("decode")
    for instance in (encoder, one, d):
        instance.answer = with_room(32, instance.answer)
    front = await start([encoder, one, *([d] if role == "prefill" else [])])
    bodies = [ask("x", image(image_bytes(size=(n // 20 + 1, n % 20 + 1)))) for n in range(300)]
    answers = await asyncio.gather(*(front.post(body) for body in bodies))
    assert [answer.status for answer in answers] == [200] * 300
    refusals = await front.metric("chiasm_proxy_language_refusals_total")
    assert refusals < 600, "waiting requests must not keep an instance busy with refusals"
    await until_idle(front)


async def test_those_that_wait_for_room_wait_for_an_instance_that_is_lost_meanwhile(start: Start) -> None:
    pd = FakeInstance("pd")
    pd.answer = FULL
    front = await start([pd], **WAITS)
    request = asyncio.ensure_future(front.post(ask("x")))
    await until_waiting(front, 1, FOR_ROOM)
    await pd.kill()
    await until_waiting(front)
    pd.answer = chat
    await pd.start()
    assert (await request).status == 200
