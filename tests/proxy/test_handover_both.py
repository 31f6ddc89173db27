"""What is the same in the handover between chiasm's prefill and decode, and between vLLM's."""

from __future__ import annotations

import asyncio
import re

import pytest

from .conftest import Start, ask, image, image_bytes, leave, until_idle
from .instances import (
    CHIASM,
    SAID,
    VLLM_PAIR,
    Answering,
    FakeInstance,
    Pair,
    full,
    half_a_response,
    in_order,
    lose,
    never,
    once,
    received_by,
    refuse,
)

both = pytest.mark.parametrize("pair", [pytest.param(CHIASM, id="chiasm"), pytest.param(VLLM_PAIR, id="vllm")])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("pair", "fault"),
    [
        (CHIASM, lose),
        (CHIASM, half_a_response),
        (VLLM_PAIR, lose),
        (VLLM_PAIR, half_a_response),
        (VLLM_PAIR, refuse(500, "the engine is dead")),
    ],
)
async def test_losing_prefill_costs_another_prefill_elsewhere(
    start: Start, pair: Pair, fault: Answering, stream: bool
) -> None:
    ps, d = [pair.prefill(), pair.prefill()], pair.decode()
    once(fault, pair.answer_prefill, *ps)
    front = await start([*ps, d])
    answer = await front.post(ask("x", stream=stream))
    assert answer.status == 200
    assert b"slept" in answer.body
    assert [len(p.received) for p in ps] == [1, 1]
    first, second = (re.sub(rb'"lease":"[0-9a-f]+"', b"", p.received[0].body) for p in ps)
    assert first == second
    assert len(d.received) == 1
    assert await front.metric("chiasm_proxy_prefill_retries_total") == 1
    assert await front.metric('chiasm_proxy_resumed_streams_total{reason="prefill_lost"}') == 0
    await until_idle(front)


@pytest.mark.parametrize(("pair", "fault", "status"), [(CHIASM, lose, 502), (VLLM_PAIR, refuse(500, "oh"), 500)])
async def test_prefills_of_a_request_are_bounded(start: Start, pair: Pair, fault: Answering, status: int) -> None:
    ps, d = [pair.prefill(), pair.prefill()], pair.decode()
    for p in ps:
        p.answer = fault
    front = await start([*ps, d], max_prefill_attempts=3)
    assert (await front.post(ask("x"))).status == status
    assert len(received_by(ps)) == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("pair", "refusal", "status"),
    [
        (CHIASM, refuse(400, "no"), 400),
        (CHIASM, refuse(500, "no"), 500),
        (VLLM_PAIR, refuse(400, "no"), 400),
    ],
)
async def test_a_refusal_of_prefill_reaches_a_client_that_has_nothing_yet(
    start: Start, pair: Pair, refusal: Answering, status: int, stream: bool
) -> None:
    ps, d = [pair.prefill(), pair.prefill()], pair.decode()
    for p in ps:
        p.answer = refusal
    front = await start([*ps, d])
    answer = await front.post(ask("x", stream=stream))
    assert (answer.status, answer.error["message"]) == (status, "no")
    assert len(received_by(ps)) == 1
    assert not d.received


@both
@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_waits_for_a_full_prefill_instance(start: Start, pair: Pair, stream: bool) -> None:
    p, d = pair.prefill(), pair.decode()
    in_order([full, full], pair.answer_prefill, p)
    front = await start([p, d])
    assert (await front.post(ask("x", stream=stream))).status == 200
    assert len(p.received) == 3


@both
async def test_an_encoder_that_refuses_an_image_ends_prefill(start: Start, pair: Pair) -> None:
    encoder, p, d = FakeInstance("encoder"), pair.prefill(), pair.decode()
    encoder.answer, p.answer = refuse(422, "not decodable"), never
    front = await start([encoder, p, d])
    answer = await front.post(ask("x", image(image_bytes())))
    assert (answer.status, answer.error["message"]) == (422, "not decodable")
    assert not d.received
    await until_idle(front)


@both
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("working", ["prefill", "decode"])
async def test_a_client_that_leaves_ends_the_open_call(start: Start, pair: Pair, working: str, stream: bool) -> None:
    p, d = pair.prefill(), pair.decode()
    at = p if working == "prefill" else d
    at.answer = never
    front = await start([p, d])
    await leave(front, ask("x", stream=stream), at)
    await asyncio.wait_for(at.gone.acquire(), 60)
    while not await front.metric('chiasm_proxy_requests_total{route="/v1/chat/completions",status="499"}'):
        pass
    await until_idle(front)


@both
async def test_an_answer_that_is_not_a_stream_is_that_of_decode(start: Start, pair: Pair) -> None:
    p, d = pair.prefill(), pair.decode()
    front = await start([p, d])
    assert (await front.post(ask("x"))).json["choices"][0]["message"]["content"] == SAID
    assert [len(one.received) for one in (p, d)] == [1, 1]
    assert await front.metric("chiasm_proxy_handovers_total") == 1
