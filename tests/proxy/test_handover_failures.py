"""Prefill or decode is lost: the answer continues elsewhere, and the client gets every token once."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from chiasm.proxy import encoders

from .conftest import GIVES_UP_SECONDS, Front, Start, ask, image, image_bytes, leave, listen, until_idle, when_encoded
from .instances import (
    SAID,
    WORDS,
    FakeInstance,
    Received,
    Then,
    after,
    begin_stream,
    break_off,
    decode,
    decode_until,
    encode,
    end_of_stream,
    event,
    full,
    handle_comment,
    handle_of,
    in_order,
    kv_unavailable,
    lose,
    never,
    once,
    only_a_head,
    prefill,
    received_by,
    refuse,
    role_event,
    tell,
    token_event,
    when,
)


def instances(role: str, count: int) -> list[FakeInstance]:
    return [FakeInstance(role) for _ in range(count)]


# Prefill.


async def test_the_last_prefill_instance_is_called_again_if_it_is_healthy(start: Start) -> None:
    p, d = FakeInstance("prefill"), FakeInstance("decode")
    once(lose, prefill, p)
    front = await start([p, d])
    assert (await front.post(ask("x"))).status == 200
    assert len(p.received) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_whose_kv_cannot_be_held_is_prefilled_elsewhere(start: Start, stream: bool) -> None:
    ps, d = instances("prefill", 2), FakeInstance("decode")
    failed: list[FakeInstance] = []

    async def answer(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        if failed:
            return await prefill(instance, request, received)
        failed.append(instance)
        return await kv_unavailable(instance, request, received)

    for p in ps:
        p.answer = answer
    front = await start([*ps, d])
    assert (await front.post(ask("x", stream=stream))).status == 200
    assert [len(p.received) for p in ps] == [1, 1]


async def test_an_unreachable_prefill_instance_costs_a_retry(start: Start) -> None:
    ps, d = instances("prefill", 2), FakeInstance("decode")
    front = await start([*ps, d], probe_interval_seconds=60)
    await ps[0].kill()
    for _ in range(3):
        assert (await front.post(ask("x"))).status == 200
    assert len(ps[1].received) == 3


async def test_losing_the_last_prefill_instance_is_an_error(start: Start) -> None:
    p, d = FakeInstance("prefill"), FakeInstance("decode")
    p.answer = never
    front = await start([p, d])
    request = asyncio.ensure_future(front.post(ask("x", stream=True)))
    await p.arrived.acquire()
    await p.kill()
    answer = await request
    assert (answer.status, answer.error["code"]) == (503, "no_prefill")


async def test_a_prefill_instance_that_is_stopping_is_replaced_by_another(start: Start) -> None:
    ps, d = instances("prefill", 2), FakeInstance("decode")
    once(refuse(503, "This instance is stopping.", kind="overloaded_error", code="stopping"), prefill, *ps)
    front = await start([*ps, d])
    assert (await front.post(ask("x"))).status == 200
    assert [len(p.received) for p in ps] == [1, 1]


async def test_losing_prefill_before_its_first_chunk_costs_a_retry_elsewhere(start: Start) -> None:
    ps, d = instances("prefill", 2), FakeInstance("decode")
    once(only_a_head, prefill, *ps)
    front = await start([*ps, d])
    assert (await listen(front, ask("x", stream=True))).text == SAID


async def test_losing_prefill_between_token_and_handle_ends_the_stream(start: Start) -> None:
    """Nobody knows which token the client has the text of."""
    seen = asyncio.Event()

    async def half(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        response = await begin_stream(request)
        await response.write(role_event() + event(WORDS[0]) + b": kv_transfer_par")
        await seen.wait()
        await break_off(request)
        return response

    ps, d = instances("prefill", 2), FakeInstance("decode")
    for p in ps:
        p.answer = half
    front = await start([*ps, d])
    heard = await listen(front, ask("x", stream=True), {1: seen})
    assert heard.text == WORDS[0]
    assert heard.error is not None
    assert not heard.ended
    assert b"kv_transfer_par" not in heard.raw
    assert len(received_by(ps)) == 1


async def test_losing_prefill_after_its_handle_changes_nothing(start: Start) -> None:
    seen = asyncio.Event()

    async def handed_over(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        response = await begin_stream(request)
        # The text comes after the handle, so whoever has seen the text knows that the handle has arrived.
        await response.write(handle_comment(handle_of(instance, 0, {})) + role_event() + event(WORDS[0]))
        await seen.wait()
        await break_off(request)
        return response

    p, d = FakeInstance("prefill"), FakeInstance("decode")
    p.answer = handed_over
    front = await start([p, d])
    assert (await listen(front, ask("x", stream=True), {1: seen})).text == SAID
    assert len(p.received) == 1


async def test_a_malformed_handle_is_an_error(start: Start) -> None:
    async def nonsense(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        response = await begin_stream(request)
        await response.write(handle_comment({"output_token_ids": "none"}))
        return response

    p, d = FakeInstance("prefill"), FakeInstance("decode")
    p.answer = nonsense
    front = await start([p, d])
    answer = await front.post(ask("x", stream=True))
    assert answer.status == 502
    assert "kv_transfer_params" in answer.error["message"]
    assert not d.received


# Decode, before its first token.


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_waits_for_a_full_decode_instance(start: Start, stream: bool) -> None:
    p, d = FakeInstance("prefill"), FakeInstance("decode")
    d.answer = full
    front = await start([p, d])
    request = asyncio.ensure_future(front.post(ask("x", stream=stream)))
    for _ in range(3):
        await asyncio.wait_for(d.arrived.acquire(), 60)
    d.answer = decode
    answer = await request
    assert answer.status == 200
    assert b"slept" in answer.body
    assert len(p.received) == 1
    assert {received.body for received in d.received} == {d.received[0].body}
    await until_idle(front)


@pytest.mark.usefixtures("giving_up_early")
async def test_a_request_waits_for_a_full_decode_instance_until_its_deadline(start: Start) -> None:
    p, d = FakeInstance("prefill"), FakeInstance("decode")
    d.answer = full
    front = await start([p, d], deadline_seconds=GIVES_UP_SECONDS)
    answer = await front.post(ask("x"))
    assert (answer.status, answer.error["code"]) == (503, "too_many_requests")
    assert 2 < len(d.received) < 24
    left = [int(received.headers["X-Request-Deadline-Ms"]) for received in d.received]
    assert left == sorted(left, reverse=True)
    assert left[-1] < left[0] <= 1000 * GIVES_UP_SECONDS


async def test_a_request_does_not_wait_for_a_decode_instance_that_is_lost(start: Start) -> None:
    p, d = FakeInstance("prefill"), FakeInstance("decode")
    d.answer = full
    front = await start([p, d])
    request = asyncio.ensure_future(front.post(ask("x")))
    await d.arrived.acquire()
    await d.kill()
    answer = await request
    assert (answer.status, answer.error["code"]) == (503, "no_decode")


@pytest.mark.parametrize("stream", [False, True])
async def test_lost_kv_is_computed_again_elsewhere(start: Start, stream: bool) -> None:
    ps, d = instances("prefill", 2), FakeInstance("decode")
    once(kv_unavailable, decode, d)
    front = await start([*ps, d])
    answer = await front.post(ask("x", stream=stream))
    assert answer.status == 200
    assert [len(p.received) for p in ps] == [1, 1]
    first, second = d.received
    assert first.params["remote_engine_id"] != second.params["remote_engine_id"]
    again = next(p for p in ps if p.url == second.params["remote_engine_id"]).received[0].params
    if stream:
        assert again["output_token_ids"] == [100]
        assert second.params["output_token_ids"] == [100, 101]
    else:
        assert again == {"do_remote_decode": True, "continues": True}
    resumed = await front.metric('chiasm_proxy_resumed_streams_total{reason="kv_unavailable"}')
    assert resumed == int(stream)
    assert await front.metric("chiasm_proxy_prefill_retries_total") == 1


async def test_the_prefill_instance_that_lost_the_kv_is_avoided_even_if_the_other_has_more_work(start: Start) -> None:
    ps, d, gate = instances("prefill", 2), FakeInstance("decode"), asyncio.Event()

    async def answer(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        if b"long" in received.body:
            await gate.wait()
        return await prefill(instance, request, received)

    for p in ps:
        p.answer = answer
    once(kv_unavailable, decode, d)
    front = await start([*ps, d])
    long = asyncio.ensure_future(front.post(ask("long" * 9000)))
    while not received_by(ps):
        await front.get("/health")
    busy = next(p for p in ps if p.received)
    assert (await front.post(ask("x"))).status == 200
    assert len(busy.received) == 2
    gate.set()
    assert (await long).status == 200


async def test_a_decode_instance_that_got_no_kv_is_avoided_even_if_the_other_has_more_work(start: Start) -> None:
    p, ds, gate = FakeInstance("prefill"), instances("decode", 2), asyncio.Event()
    for d in ds:
        d.answer = after(gate, decode)
    front = await start([p, *ds])
    long = asyncio.ensure_future(front.post(ask("long")))
    while not received_by(ds):
        await front.get("/health")
    idle, busy = sorted(ds, key=lambda d: len(d.received))
    idle.answer, busy.answer = kv_unavailable, decode
    assert (await front.post(ask("x"))).status == 200
    assert (len(idle.received), len(busy.received)) == (1, 2)
    gate.set()
    assert (await long).status == 200


async def test_decode_may_be_preempted_before_its_answer(start: Start) -> None:
    p, d = FakeInstance("prefill"), FakeInstance("decode")
    once(refuse(503, "no blocks", kind="kv_unavailable_error", code="preempted"), decode, d)
    front = await start([p, d])
    assert (await listen(front, ask("x", stream=True))).words == list(WORDS)
    assert await front.metric('chiasm_proxy_resumed_streams_total{reason="preempted"}') == 1


async def test_a_lease_may_run_out_while_decode_is_full(start: Start) -> None:
    p, d = FakeInstance("prefill"), FakeInstance("decode")
    in_order([full, full, kv_unavailable, full], decode, d)
    front = await start([p, d])
    assert (await listen(front, ask("x", stream=True))).text == SAID
    assert (len(p.received), len(d.received)) == (2, 5)


async def test_attempts_to_recompute_lost_kv_are_bounded(start: Start) -> None:
    p, d = FakeInstance("prefill"), FakeInstance("decode")
    d.answer = kv_unavailable
    front = await start([p, d])
    answer = await front.post(ask("x"))
    assert (answer.status, answer.error["code"]) == (503, "kv_unavailable")
    assert len(p.received) == 4
    heard = await listen(front, ask("x", stream=True))
    assert heard.text == "".join(WORDS[:4])
    assert heard.error is not None
    assert heard.error["code"] == "kv_unavailable"
    assert len(p.received) == 8


@pytest.mark.parametrize("stream", [False, True])
async def test_losing_decode_before_its_answer_costs_no_prefill(start: Start, stream: bool) -> None:
    """Another instance can fetch the KV as long as none has."""
    p, ds = FakeInstance("prefill"), instances("decode", 2)
    once(lose, decode, *ds)
    front = await start([p, *ds])
    answer = await front.post(ask("x", stream=stream))
    assert answer.status == 200
    assert b"slept" in answer.body
    assert len(p.received) == 1
    assert [len(d.received) for d in ds] == [1, 1]
    assert ds[0].received[0].body == ds[1].received[0].body


async def test_an_unreachable_decode_instance_costs_another_call(start: Start) -> None:
    p, ds = FakeInstance("prefill"), instances("decode", 2)
    front = await start([p, *ds], probe_interval_seconds=60)
    await ds[0].kill()
    for _ in range(3):
        assert (await listen(front, ask("x", stream=True))).text == SAID
    assert len(p.received) == len(ds[1].received) == 3


async def test_a_refusal_of_decode_ends_the_stream_with_its_error(start: Start) -> None:
    p, ds = FakeInstance("prefill"), instances("decode", 2)
    for d in ds:
        d.answer = refuse(400, "too long", code="context_length_exceeded")
    front = await start([p, *ds])
    heard = await listen(front, ask("x", stream=True))
    assert heard.error == {
        "message": "too long",
        "type": "invalid_request_error",
        "param": None,
        "code": "context_length_exceeded",
    }
    assert len(received_by(ds)) == 1
    assert (await front.post(ask("x"))).status == 400


# Decode, during its answer.


@pytest.mark.parametrize("words", [1, 2, 5, 7])
@pytest.mark.parametrize(
    ("then", "reason"),
    [
        (break_off, "decode_lost"),
        (tell("lost", "kv_unavailable_error", "kv_unavailable"), "kv_unavailable"),
        (tell("no blocks", "kv_unavailable_error", "preempted"), "preempted"),
        (tell("This instance is stopping.", "overloaded_error", "stopping"), "decode_lost"),
    ],
)
async def test_a_stream_continues_after_decode_is_lost(start: Start, words: int, then: Then, reason: str) -> None:
    seen = asyncio.Event()
    ps, ds = instances("prefill", 2), instances("decode", 2)
    once(decode_until(words, when(seen, then)), decode, *ds)
    front = await start([*ps, *ds])
    heard = await listen(front, ask("x", stream=True), {words: seen})
    assert heard.words == list(WORDS)
    assert heard.error is None
    assert heard.ended
    assert heard.raw.count(b'"role"') == heard.raw.count(b"[DONE]") == 1
    assert b"tokens" not in heard.raw
    first, again = sorted(received_by(ps), key=lambda one: len(one.params))
    assert first.params == {"do_remote_decode": True, "continues": True}
    assert again.params == {
        "do_remote_decode": True,
        "continues": True,
        "output_token_ids": [100 + index for index in range(words)],
        "num_sent": words,
        "seed": 7,
        "created": 1,
        "cached_tokens": 16,
    }
    assert len(received_by(ds)) == (2 if words < 7 else 1)
    assert await front.metric(f'chiasm_proxy_resumed_streams_total{{reason="{reason}"}}') == 1
    assert await front.metric("chiasm_proxy_prefill_retries_total") == 1
    await until_idle(front)


async def test_an_incomplete_event_does_not_count_as_sent(start: Start) -> None:
    seen = asyncio.Event()

    async def cut(request: web.Request, response: web.StreamResponse) -> None:
        await response.write(token_event(3)[:-5])
        await seen.wait()
        await break_off(request)

    p, d = FakeInstance("prefill"), FakeInstance("decode")
    once(decode_until(3, cut), decode, d)
    front = await start([p, d])
    assert (await listen(front, ask("x", stream=True), {3: seen})).words == list(WORDS)
    assert p.received[1].params["num_sent"] == 3


async def test_tokens_without_text_are_kept_too(start: Start) -> None:
    """A token may be a part of a character, whose text comes with the next token."""
    seen = asyncio.Event()

    async def silently(request: web.Request, response: web.StreamResponse) -> None:
        await response.write(b": tokens 102 103\n\n: tokens 104\n\n" + token_event(5))
        await seen.wait()
        await break_off(request)

    p, d = FakeInstance("prefill"), FakeInstance("decode")
    once(decode_until(2, silently), decode, d)
    front = await start([p, d])
    heard = await listen(front, ask("x", stream=True), {3: seen})
    assert heard.words == [WORDS[0], WORDS[1], *WORDS[5:]]
    assert p.received[1].params["output_token_ids"] == list(range(100, 106))


async def test_a_stream_survives_as_many_losses_as_allowed(start: Start) -> None:
    seen = {count: asyncio.Event() for count in (2, 4, 6, 8)}
    losses = [decode_until(count, when(seen[count])) for count in (2, 4, 6)]
    ps, ds = instances("prefill", 2), instances("decode", 2)
    in_order(losses, decode, *ds)
    front = await start([*ps, *ds])
    assert (await listen(front, ask("x", stream=True), seen)).words == list(WORDS)
    assert len(received_by(ps)) == 4
    in_order(losses, decode, *ds)
    short = await start([], prefills=tuple(p.url for p in ps), decodes=tuple(d.url for d in ds), max_prefill_attempts=3)
    for one in seen.values():
        one.clear()
    heard = await listen(short, ask("x", stream=True), seen)
    assert heard.words == list(WORDS[:6])
    assert heard.error is not None
    assert not heard.ended


async def test_an_answer_that_progresses_each_time_may_be_preempted_any_number_of_times(
    start: Start,
) -> None:
    p, d = FakeInstance("prefill"), FakeInstance("decode")

    async def one_more_word(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        sent = received.params["num_sent"]
        answer = decode_until(sent + 1, tell("no blocks", "kv_unavailable_error", "preempted"))
        return await (answer if sent + 1 < len(WORDS) - 1 else decode)(instance, request, received)

    d.answer = one_more_word
    front = await start([p, d], max_prefill_attempts=1)
    heard = await listen(front, ask("x", stream=True), {})
    assert heard.words == list(WORDS)
    assert heard.error is None
    assert len(p.received) > 2


async def test_losing_all_decode_instances_ends_the_stream_with_an_error(start: Start) -> None:
    seen = asyncio.Event()
    p, ds = FakeInstance("prefill"), instances("decode", 2)

    for d in ds:
        d.answer = decode_until(5, when(seen, break_off))
    front = await start([p, *ds])

    async def kill_all() -> None:
        await seen.wait()
        await asyncio.gather(*(d.kill() for d in ds))

    killing = asyncio.ensure_future(kill_all())
    heard = await listen(front, ask("x", stream=True), {5: seen})
    await killing
    assert heard.words[:5] == list(WORDS[:5])
    assert heard.error is not None
    assert not heard.ended
    assert len(p.received) <= 4


async def test_nothing_is_prefilled_again_without_a_decode_instance(start: Start) -> None:
    seen = asyncio.Event()
    p, d = FakeInstance("prefill"), FakeInstance("decode")
    d.answer = decode_until(5, when(seen))
    front = await start([p, d], probe_interval_seconds=60)
    listening = asyncio.ensure_future(listen(front, ask("x", stream=True), {5: seen}))
    await seen.wait()
    await d.kill()
    heard = await listening
    assert heard.words == list(WORDS[:5])
    assert heard.error is not None
    assert heard.error["code"] == "no_decode"
    assert len(p.received) == 1


async def test_other_errors_of_decode_are_passed_on_and_end_the_stream(start: Start) -> None:
    p, ds = FakeInstance("prefill"), instances("decode", 2)
    for d in ds:
        d.answer = decode_until(3, tell("the engine failed", "internal_error", None))
    front = await start([p, *ds])
    heard = await listen(front, ask("x", stream=True))
    assert heard.words == list(WORDS[:3])
    assert heard.error == {"message": "the engine failed", "type": "internal_error", "param": None, "code": None}
    assert len(p.received) == len(received_by(ds)) == 1


@pytest.mark.parametrize("given", [{"output_token_ids": []}, {"prompts": [{}, {}]}])
async def test_a_stream_of_several_answers_cannot_be_resumed(start: Start, given: dict[str, Any]) -> None:
    seen = asyncio.Event()

    async def nothing_yet(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        response = await begin_stream(request)
        await response.write(handle_comment(given))
        return response

    async def begin_and_die(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        response = await begin_stream(request)
        await response.write(event("a "))
        await seen.wait()
        await break_off(request)
        return response

    p, d = FakeInstance("prefill"), FakeInstance("decode")
    p.answer, d.answer = nothing_yet, begin_and_die
    front = await start([p, d])
    heard = await listen(front, ask("x", stream=True, n=2), {1: seen})
    assert heard.words == ["a "]
    assert heard.error is not None
    assert len(p.received) == 1


async def test_several_answers_start_again_if_nothing_was_sent(start: Start) -> None:
    async def nothing_yet(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        response = await begin_stream(request)
        await response.write(handle_comment({"output_token_ids": []}))
        return response

    async def begin_all(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        response = await begin_stream(request)
        await response.write(event("a ") + end_of_stream())
        return response

    p, d = FakeInstance("prefill"), FakeInstance("decode")
    p.answer = nothing_yet
    once(kv_unavailable, begin_all, d)
    front = await start([p, d])
    heard = await listen(front, ask("x", stream=True, n=2))
    assert heard.words == ["a "]
    assert heard.ended


async def test_losing_decode_after_the_end_of_the_text_adds_no_text(start: Start) -> None:
    seen = asyncio.Event()

    async def finish(request: web.Request, response: web.StreamResponse) -> None:
        await response.write(end_of_stream().split(b"\n\n")[0] + b"\n\n")
        await seen.wait()
        await break_off(request)

    p, d = FakeInstance("prefill"), FakeInstance("decode")
    d.answer = decode_until(8, finish)
    front = await start([p, d])
    async with front.session.post(f"{front.url}/v1/chat/completions", json=ask("x", stream=True)) as response:
        while b'"finish_reason": "stop"' not in await response.content.readuntil(b"\n\n"):
            pass
        seen.set()
        rest = await response.read()
    assert "error" in json.loads(rest.removeprefix(b"data: "))
    assert len(p.received) == 1


async def test_an_answer_that_is_not_a_stream_starts_again(start: Start) -> None:
    ps, ds = instances("prefill", 2), instances("decode", 2)
    once(decode_until(0, break_off), decode, *ds)
    front = await start([*ps, *ds])
    answer = await front.post(ask("x"))
    assert answer.json["choices"][0]["message"]["content"] == SAID
    assert [received.params for received in received_by(ps)] == [{"do_remote_decode": True, "continues": True}] * 2


async def test_a_resumed_answer_waits_for_a_full_prefill_instance(start: Start) -> None:
    """Only a client that has nothing yet is told to try again."""
    seen = asyncio.Event()
    p, d = FakeInstance("prefill"), FakeInstance("decode")
    in_order([prefill, full, full], prefill, p)
    once(decode_until(3, when(seen)), decode, d)
    front = await start([p, d])
    assert (await listen(front, ask("x", stream=True), {3: seen})).words == list(WORDS)
    assert len(p.received) == 4


async def test_a_resumed_answer_does_not_wait_for_a_lost_embedding(start: Start) -> None:
    seen = asyncio.Event()
    p, d = FakeInstance("prefill"), FakeInstance("decode")
    once(prefill, refuse(503, "the embedding is lost", kind="embedding_unavailable_error"), p)
    once(decode_until(3, when(seen)), decode, d)
    front = await start([p, d])
    heard = await listen(front, ask("x", stream=True), {3: seen})
    assert heard.error is not None
    assert heard.error["message"] == "the embedding is lost"
    assert len(p.received) == 2


async def test_losing_prefill_while_resuming_costs_one_more_prefill(start: Start) -> None:
    seen = asyncio.Event()
    ps, d = instances("prefill", 2), FakeInstance("decode")
    in_order([prefill, lose], prefill, *ps)
    once(decode_until(3, when(seen)), decode, d)
    front = await start([*ps, d])
    assert (await listen(front, ask("x", stream=True), {3: seen})).words == list(WORDS)
    counts = [len(received.params.get("output_token_ids", ())) for received in received_by(ps)]
    assert sorted(counts) == [0, 3, 3]


async def test_an_image_is_encoded_once_though_its_prompt_is_prefilled_twice(start: Start) -> None:
    encoder, ps, d = FakeInstance("encoder"), instances("prefill", 2), FakeInstance("decode")
    once(kv_unavailable, decode, d)
    front = await start([encoder, *ps, d])
    heard = await listen(front, ask("x", image(image_bytes()), stream=True))
    assert heard.text == SAID
    assert len(encoder.received) == 1
    names = {received.identifiers[0] for received in (*received_by(ps), *d.received)}
    assert len(received_by(ps)) == 2
    assert names == set(encoder.received[0].identifiers)


async def test_an_image_that_an_encoder_still_has_is_not_given_up_when_its_prompt_is_prefilled_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first prefill instance had the prompt in its prefix cache, and the second needs the embedding."""
    monkeypatch.setattr(encoders, "_AFTER_ANSWER_SECONDS", 0.0)
    encoder, ps, d = FakeInstance("encoder"), instances("prefill", 2), FakeInstance("decode")
    is_needed = asyncio.Event()

    async def need_it(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        for _ in range(3):  # so that the proxy would have given it up
            await front.get("/health")
        is_needed.set()
        return await when_encoded(front, prefill)(instance, request, received)

    encoder.answer = after(is_needed, encode)
    once(prefill, need_it, *ps)
    once(kv_unavailable, decode, d)
    front = await start([encoder, *ps, d])
    assert (await listen(front, ask("x", image(image_bytes()), stream=True))).text == SAID
    assert len(encoder.received) == 1
    await until_idle(front)


async def test_an_encoder_that_stops_does_not_cause_another_prefill(start: Start) -> None:
    encoder, p, d = FakeInstance("encoder"), FakeInstance("prefill"), FakeInstance("decode")
    encoder.answer, p.answer = refuse(503, "This instance is stopping.", code="stopping"), never
    front = await start([encoder, p, d], max_encode_attempts=1)
    answer = await front.post(ask("x", image(image_bytes())))
    assert (answer.status, answer.error["code"]) == (503, "stopping")
    assert await front.metric("chiasm_proxy_prefill_retries_total") == 0
    await until_idle(front)


# Deadlines and clients


@pytest.mark.parametrize("silent", ["prefill", "decode"])
async def test_the_deadline_covers_prefill_and_decode_together(start: Start, silent: str) -> None:
    p, d = FakeInstance("prefill"), FakeInstance("decode")
    hanging = p if silent == "prefill" else d
    hanging.answer = never
    front = await start([p, d], deadline_seconds=3.0)
    answer = await front.post(ask("x", stream=True))
    assert b"deadline" in answer.body
    assert answer.status == (504 if hanging is p else 200)
    await asyncio.wait_for(hanging.gone.acquire(), 60)
    assert all(0 < int(one.headers["X-Request-Deadline-Ms"]) <= 3000 for one in received_by([p, d]))
    await until_idle(front)


async def test_a_client_may_leave_while_its_request_waits_for_decode(start: Start) -> None:
    p, d = FakeInstance("prefill"), FakeInstance("decode")
    d.answer = full
    front = await start([p, d])
    await leave(front, ask("x"), d)
    while not await front.metric('chiasm_proxy_requests_total{route="/v1/chat/completions",status="499"}'):
        pass
    await until_idle(front)


async def test_a_client_that_leaves_ends_the_stream_of_decode(start: Start) -> None:
    p, d = FakeInstance("prefill"), FakeInstance("decode")
    d.answer = decode_until(4, when(asyncio.Event()))
    front: Front = await start([p, d])
    response = await front.session.post(f"{front.url}/v1/chat/completions", json=ask("x", stream=True))
    for _ in range(3):
        await response.content.readuntil(b"\n\n")
    response.close()
    await asyncio.wait_for(d.gone.acquire(), 60)
    await until_idle(front)


def test_the_words_of_the_fake_answer_are_distinct() -> None:
    """Otherwise the tests above wouldn't notice a missing or repeated token."""
    assert len(set(WORDS)) == len(WORDS)
    assert handle_of(FakeInstance("prefill"), 2, {})["output_token_ids"] == [100, 101, 102]
