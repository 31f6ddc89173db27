"""What came of an estimate: requests' records have it, and a metric has the measured time over it."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from chiasm.http.timing import TimingEntry, write_timing
from chiasm.wire import CHAT_PATH, Costs, ImageCost

from .conftest import Front, Start, ask, image, image_bytes
from .instances import MODEL, VLLM, FakeInstance, Received, chat, event, whole

PER_TOKEN = 0.001
ENCODE = 0.5
TTFT = 3.0
STEP = 0.02
IMAGES = [ImageCost(pixels=64, tokens=100, encode_seconds=ENCODE)]


async def chat_with_ttft(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
    answer = await chat(instance, request, received)
    answer.headers["Server-Timing"] = write_timing([TimingEntry("ttft", TTFT)])
    return answer


def fleet() -> list[FakeInstance]:
    pd = FakeInstance("pd", costs=Costs(prefill_seconds_per_token=PER_TOKEN, images=IMAGES))
    pd.answer = chat_with_ttft
    return [FakeInstance("encoder", costs=Costs(images=IMAGES)), pd]


async def ratios(front: Front, what: str, *, at_least: int = 0) -> tuple[float, float]:
    """The number of outcomes of this kind, when there are as many, and the sum of their ratios."""
    name, label = "chiasm_proxy_estimate_ratio", f'{{what="{what}"}}'
    async with asyncio.timeout(60):
        while (count := await front.metric(f"{name}_count{label}")) < at_least:
            pass  # each look takes a turn of its own
    return count, await front.metric(f"{name}_sum{label}")


async def test_a_record_has_the_estimate_and_the_metric_what_came_of_it(start: Start) -> None:
    front = await start(fleet())
    body = ask("how many?")
    await front.post(body, **{"X-Request-Id": "text"})
    estimate = (await front.record("text"))["stages"]["estimate"]
    assert 16 * PER_TOKEN < estimate < (16 + len(str(body))) * PER_TOKEN
    count, total = await ratios(front, "first_token")
    assert count == 1
    assert total == pytest.approx(TTFT / estimate, rel=1e-3)
    assert (await ratios(front, "embedding"))[0] == 0


async def test_the_estimate_of_an_image_has_its_outcome_too(start: Start) -> None:
    front = await start(fleet())
    await front.post(ask(image(image_bytes())), **{"X-Request-Id": "one"})
    estimate = (await front.record("one"))["stages"]["estimate"]
    assert estimate > ENCODE + 100 * PER_TOKEN
    assert (await ratios(front, "first_token"))[1] == pytest.approx(TTFT / estimate, rel=1e-3)
    count, total = await ratios(front, "embedding", at_least=1)
    assert count == 1
    assert total > 0


async def with_step(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
    timing = {"Server-Timing": write_timing([TimingEntry("step", 2 * STEP)])}
    if not received.json.get("stream"):
        return web.json_response(whole("a cat", "stop"), headers=timing)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"} | timing)
    await response.prepare(request)
    await response.write(event("a cat") + b"data: [DONE]\n\n")
    return response


async def learned_step(front: Front, role: str) -> float:
    instances = (await front.get("/health")).json["instances"]
    (found,) = [one["costs"].get("decode_step_seconds", 0.0) for one in instances if one["role"] == role]
    return float(found)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_seconds_of_a_step_are_learned_from_answers(start: Start, stream: bool) -> None:
    pd = FakeInstance("pd", costs=Costs(decode_step_seconds=STEP))
    pd.answer = with_step
    front = await start([pd])
    assert await learned_step(front, "pd") == STEP
    await front.post(ask("x", stream=stream), **{"X-Request-Id": "one"})
    await front.record("one")
    assert STEP < await learned_step(front, "pd") < 2 * STEP


async def test_they_are_learned_of_decode_instances_too(start: Start) -> None:
    p, d = FakeInstance("prefill"), FakeInstance("decode", costs=Costs(decode_step_seconds=STEP))
    d.answer = with_step
    front = await start([p, d])
    await front.post(ask("x"), **{"X-Request-Id": "one"})
    await front.record("one")
    assert STEP < await learned_step(front, "decode") < 2 * STEP


TOKENS = 1000
TEXT_BYTES = 40_000
MESSAGES = {"model": MODEL, "messages": [{"role": "user", "content": "x" * TEXT_BYTES}]}


def answering(*told: TimingEntry, until: asyncio.Event | None = None) -> FakeInstance:
    """Return a PD of vLLM that tells this with each answer; a stream goes on after its first event when ``until`` is set."""

    async def answer(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        timing = {"Server-Timing": write_timing(told)}
        if not received.json.get("stream"):
            return web.json_response(whole("a cat", "stop"), headers=timing)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"} | timing)
        await response.prepare(request)
        await response.write(event("a cat"))
        if until is not None:
            await until.wait()
        await response.write(b"data: [DONE]\n\n")
        return response

    pd = FakeInstance("pd", engine=VLLM["engine"], costs=Costs(prefill_seconds_per_token=PER_TOKEN))
    pd.answer = answer
    return pd


async def learned_prefill(front: Front) -> float:
    (one,) = (await front.get("/health")).json["instances"]
    return float(one["costs"]["prefill_seconds_per_token"])


@pytest.mark.parametrize("path", ["/v1/messages", CHAT_PATH])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_a_prompt_costs_is_learned_on_every_path(start: Start, path: str, stream: bool) -> None:
    tokens = [TimingEntry("prompt_tokens", description=str(TOKENS)), TimingEntry("cached_tokens", description="0")]
    front = await start([answering(TimingEntry("prefill_work", 2 * TOKENS * PER_TOKEN), *tokens)])
    await front.post(MESSAGES | {"stream": stream}, path, **{"X-Request-Id": "one"})
    await front.record("one")
    assert PER_TOKEN < await learned_prefill(front) < 2 * PER_TOKEN


async def test_nothing_is_learned_of_a_path_whose_answer_tells_of_no_prompt(start: Start) -> None:
    front = await start([answering(TimingEntry("ttft", TTFT))])
    await front.post(MESSAGES, "/tokenize", **{"X-Request-Id": "one"})
    await front.record("one")
    assert await learned_prefill(front) == PER_TOKEN
    assert (await ratios(front, "first_token"))[0] == 0


async def test_a_stream_of_another_path_that_has_begun_is_no_prompt_that_others_wait_for(start: Start) -> None:
    may_end = asyncio.Event()
    pd = answering(until=may_end)
    front = await start([pd])
    async with front.session.post(f"{front.url}/v1/messages", json=MESSAGES | {"stream": True}) as response:
        await response.content.readany()
        await front.post(ask("x"), **{"X-Request-Id": "two"})
        may_end.set()
    assert (await front.record("two"))["stages"]["estimate"] < TEXT_BYTES / 10 * PER_TOKEN
