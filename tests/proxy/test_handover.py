"""From prefill to decode: the first token goes to the client at once, decode continues from it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from chiasm.media import identifier
from chiasm.wire import Costs

from .conftest import Front, Heard, Start, ask, data_url, image, image_bytes, listen, until_idle, when_encoded
from .instances import (
    FINGERPRINT,
    MODEL,
    SAID,
    WORDS,
    FakeInstance,
    Received,
    after,
    begin_stream,
    chat,
    decode,
    encode,
    end_of_stream,
    event,
    full,
    handle_comment,
    handle_of,
    prefill,
    role_event,
    token_event,
    whole,
)

ASKED = {"do_remote_decode": True, "continues": True}
BODY = b'{ "model":"tiny" ,\n "messages":[{"role":"user","content":"h\\u00e9llo \xc3\xa9"}],"x":1.50%b}'


async def begin(start: Start, *more: FakeInstance, **config: Any) -> tuple[Front, FakeInstance, FakeInstance]:
    """Start a proxy in front of one prefill and one decode instance."""
    p, d = FakeInstance("prefill"), FakeInstance("decode")
    return await start([p, d, *more], **config), p, d


def text_of(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"])


# Without a stream.


async def test_an_answer_that_is_not_a_stream_is_passed_on_from_decode_unchanged(start: Start) -> None:
    front, p, d = await begin(start)
    answer = await front.post(BODY % b"")
    assert answer.status == 200, answer.body
    assert answer.body == json.dumps(whole(SAID, "stop")).encode()
    assert len(p.received) == len(d.received) == 1
    await until_idle(front)


@pytest.mark.parametrize("end", [b"", b" \r\n\t", b"\n\n"])
@pytest.mark.parametrize("own", [b"", b',"kv_transfer_params": null', b', "kv_transfer_params":{}, "y":[1e2]'])
async def test_a_body_passes_unchanged_except_for_an_appended_member(start: Start, own: bytes, end: bytes) -> None:
    front, p, d = await begin(start)
    body = BODY % own
    assert (await front.post(body + end)).status == 200
    for instance in (p, d):
        assert instance.received[0].body.startswith(body[:-1] + b',"kv_transfer_params":{')
    assert p.received[0].params == ASKED
    assert d.received[0].params == handle_of(p, 0, {}) | {"continues": True}


async def test_an_empty_completion_gets_a_member_too(start: Start) -> None:
    front, p, _ = await begin(start)
    assert (await front.post(b"{ }", "/v1/completions")).status == 200
    assert list(p.received[0].json) == ["kv_transfer_params"]
    assert p.received[0].params == ASKED
    assert p.received[0].path == "/v1/completions"


async def test_the_handle_keeps_its_bytes(start: Start) -> None:
    raw = b'{"do_remote_prefill": true, "x": [1,  2.50], "output_token_ids": [5], "created": 12, "y": "\\u00e9"}'

    async def answer(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        return web.Response(body=b'{"choices": [], "kv_transfer_params": %b}' % raw, content_type="application/json")

    front, p, d = await begin(start)
    p.answer = answer
    assert (await front.post(ask("x"))).status == 200
    sent = d.received[0].body
    for member in (b'"x":[1,  2.50]', b'"y":"\\u00e9"', b'"created":12', b'"continues":true'):
        assert member in sent


@pytest.mark.parametrize("params", [b"", b', "kv_transfer_params": null'])
async def test_an_answer_that_prefill_completes_passes_unchanged_and_decode_is_not_called(
    start: Start, params: bytes
) -> None:
    body = b'{"choices":[ {"message":{"content":"yes"}} ] %b}' % params

    async def answer(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        return web.Response(body=body, content_type="application/json")

    front, p, d = await begin(start)
    p.answer = answer
    assert (await front.post(ask("x", max_tokens=1))).body == body
    assert not d.received
    assert await front.metric("chiasm_proxy_handovers_total") == 0


async def test_the_handle_for_several_answers_passes_unchanged(start: Start) -> None:
    handle = {"remote_block_ids": [3], "output_token_ids": [], "created": 4, "continues": True}
    handles = {"prompts": [handle, handle]}
    front, p, d = await begin(start)
    for given in (handle, handles):

        async def answer(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
            return web.json_response({"kv_transfer_params": given})  # noqa: B023

        p.answer = answer
        assert (await front.post(ask("x", n=2))).status == 200
        assert d.received[-1].params == given


# Streams


def tokens_of(heard: Heard) -> bytes:
    """The stream without the proxy's figures."""
    return b"".join(block + b"\n\n" for block in heard.raw.split(b"\n\n")[:-1] if b": server-timing" not in block)


async def test_a_stream_of_two_parts_looks_like_one(start: Start) -> None:
    front, p, d = await begin(start)
    heard = await listen(front, ask("x", stream=True))
    assert heard.text == SAID
    assert heard.ended
    finish = end_of_stream().split(b"\n\n")[0] + b"\n\n"
    assert tokens_of(heard) == role_event() + b"".join(map(event, WORDS)) + finish + b"data: [DONE]\n\n"
    assert p.received[0].params == ASKED
    assert d.received[0].params == handle_of(p, 0, {}) | {"continues": True, "num_sent": 1}
    await until_idle(front)


async def test_the_first_token_reaches_the_client_before_decode_has_answered(start: Start) -> None:
    seen = asyncio.Event()

    front, _, d = await begin(start)
    d.answer = after(seen, decode)
    heard = await listen(front, ask("x", stream=True), {1: seen})
    assert heard.text == SAID


async def test_the_first_token_reaches_the_client_before_the_handle_has_arrived(start: Start) -> None:
    seen = asyncio.Event()

    async def slowly(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        response = await begin_stream(request)
        await response.write(role_event() + event(WORDS[0]))
        await seen.wait()
        await response.write(handle_comment(handle_of(instance, 0, {})))
        return response

    front, p, _ = await begin(start)
    p.answer = slowly
    assert (await listen(front, ask("x", stream=True), {1: seen})).text == SAID


async def test_tokens_of_decode_are_passed_on_as_they_arrive(start: Start) -> None:
    seen = {count: asyncio.Event() for count in range(len(WORDS) + 1)}

    async def one_by_one(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        response = await begin_stream(request)
        for index in range(1, len(WORDS)):
            await seen[index].wait()
            await response.write(token_event(index))
        await response.write(end_of_stream())
        return response

    front, _, d = await begin(start)
    d.answer = one_by_one
    assert (await listen(front, ask("x", stream=True), seen)).text == SAID


async def test_decode_is_not_called_for_a_stream_that_prefill_completes(start: Start) -> None:
    async def only_a_token(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        response = await begin_stream(request)
        await response.write(role_event() + event("yes") + end_of_stream())
        return response

    front, p, d = await begin(start)
    p.answer = only_a_token
    heard = await listen(front, ask("x", stream=True))
    assert heard.text == "yes"
    assert heard.ended
    assert heard.raw.count(b"[DONE]") == 1
    assert not d.received


@pytest.mark.parametrize("given", [{"output_token_ids": []}, {"prompts": [{"num_tokens": 3}]}])
async def test_a_stream_whose_first_tokens_d_samples_begins_with_d(start: Start, given: dict[str, Any]) -> None:
    async def nothing_yet(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        response = await begin_stream(request)
        await response.write(handle_comment(given))
        return response

    front, p, d = await begin(start)
    p.answer, d.answer = nothing_yet, chat
    heard = await listen(front, ask("x", stream=True, n=2))
    assert heard.text == "a cat"
    assert heard.ended
    assert d.received[0].params == given


async def test_a_refusal_of_decode_has_a_status_if_nothing_was_sent(start: Start) -> None:
    async def nothing_yet(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        response = await begin_stream(request)
        await response.write(handle_comment({"prompts": [{}]}))
        return response

    async def refuse(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no such thing"}}, status=400)

    front, p, d = await begin(start)
    p.answer, d.answer = nothing_yet, refuse
    answer = await front.post(ask("x", stream=True))
    assert answer.status == 400
    assert answer.json["error"]["message"] == "no such thing"


async def test_the_openai_client_reads_it(start: Start) -> None:
    front, _, _ = await begin(start)
    stream = await front.openai.chat.completions.create(**ask("x"), stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SAID
    assert chunks[-1].choices[0].finish_reason == "stop"
    answer = await front.openai.chat.completions.create(**ask("x"))
    assert answer.choices[0].message.content == SAID


# Images.


async def test_encoders_and_prefill_are_called_at_once_and_decode_gets_no_pixels(start: Start) -> None:
    encoder = FakeInstance("encoder")
    front, p, d = await begin(start, encoder)

    async def after_p(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await p.arrived.acquire()
        return await encode(instance, request, received)

    encoder.answer = after_p
    data = image_bytes(size=(30, 20))
    assert (await front.post(ask("what is it?", image(data), temperature=0.5))).status == 200
    name = identifier(data, fingerprint=FINGERPRINT)
    embeds = {"type": "image_embeds", "image_embeds": {"image_size": [20, 30]}, "uuid": name}
    part = {"type": "image_url", "image_url": {"url": data_url(data)}, "uuid": name}
    assert encoder.received[0].parts == [part]
    for instance in (p, d):
        sent = instance.received[0].json
        del sent["kv_transfer_params"]
        assert sent == ask("what is it?", embeds, temperature=0.5)
    await until_idle(front)


async def test_decode_is_called_even_if_an_encoder_still_works_on_what_prefill_had(start: Start) -> None:
    encoder, never_done = FakeInstance("encoder"), asyncio.Event()

    async def hang(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await never_done.wait()
        raise AssertionError

    encoder.answer = hang
    front, _, _ = await begin(start, encoder)
    assert (await listen(front, ask("x", image(image_bytes()), stream=True))).text == SAID
    await asyncio.wait_for(encoder.gone.acquire(), 60)
    await until_idle(front)


async def test_text_calls_no_encoder_and_needs_none(start: Start) -> None:
    encoder = FakeInstance("encoder")
    front, _, _ = await begin(start, encoder)
    await front.post(ask("x"))
    assert not encoder.received
    await encoder.kill()
    await front.until(encoder, "unhealthy")
    assert (await front.post(ask("x"))).status == 200
    assert (await front.post(ask("x", image(image_bytes())))).error["code"] == "no_encoder"


async def test_images_are_freed_while_decode_answers(start: Start) -> None:
    """Only the body without pixels is kept, in case the prompt must be prefilled again."""
    encoder, going = FakeInstance("encoder"), asyncio.Event()

    front, p, d = await begin(start, encoder)
    p.answer, d.answer = when_encoded(front, prefill), after(going, decode)
    request = asyncio.ensure_future(front.post(ask("x", image(image_bytes(size=(800, 800), format="BMP")))))
    await d.arrived.acquire()
    assert 0 < front.service.admission.held_bytes < 1000
    going.set()
    assert (await request).status == 200


# Which instance is called.


async def test_the_prefill_instance_with_the_fewest_unanswered_prompts_is_chosen(start: Start) -> None:
    # So slow that no prompt counts as computed before it is answered, however slow the machine is.
    costs = Costs(prefill_seconds_per_token=10.0)
    ps, d, gate = [FakeInstance("prefill", costs=costs) for _ in range(2)], FakeInstance("decode"), asyncio.Event()

    for p in ps:
        p.answer = after(gate, prefill)
    front = await start([*ps, d])
    requests = [asyncio.ensure_future(front.post(ask("x" * 9000)))]
    while not any(p.received for p in ps):
        await front.get("/health")
    requests += [asyncio.ensure_future(front.post(ask("x"))) for _ in range(4)]
    while sum(len(p.received) for p in ps) < 5:
        await front.get("/health")
    assert sorted(len(p.received) for p in ps) == [1, 4]
    gate.set()
    assert {answer.status for answer in await asyncio.gather(*requests)} == {200}


async def test_a_prompt_stops_counting_as_work_when_prefill_has_answered(start: Start) -> None:
    front, _, d = await begin(start)
    going = asyncio.Event()

    d.answer = after(going, decode)
    request = asyncio.ensure_future(front.post(ask("x")))
    await d.arrived.acquire()
    shown = {
        one["role"]: (one["outstanding_work"], one["in_flight"])
        for one in (await front.get("/health")).json["instances"]
    }
    assert shown == {"prefill": (0.0, 0), "decode": (1.0, 1)}
    going.set()
    assert (await request).status == 200


async def test_decode_is_chosen_by_its_running_sequences(start: Start) -> None:
    p, ds, gate = FakeInstance("prefill"), [FakeInstance("decode"), FakeInstance("decode")], asyncio.Event()

    for d in ds:
        d.answer = after(gate, decode)
    front = await start([p, *ds])
    requests = [asyncio.ensure_future(front.post(ask("x" * 10**n))) for n in (4, 1, 1, 1)]
    while sum(len(d.received) for d in ds) < 4:
        await front.get("/health")
    assert [len(d.received) for d in ds] == [2, 2]
    gate.set()
    assert {answer.status for answer in await asyncio.gather(*requests)} == {200}


async def test_decode_is_chosen_by_its_free_blocks(start: Start) -> None:
    p, crowded, empty = FakeInstance("prefill"), FakeInstance("decode", kv_blocks_free=40), FakeInstance("decode")
    front = await start([p, crowded, empty])
    for _ in range(3):
        assert (await front.post(ask("x"))).status == 200
    assert (len(crowded.received), len(empty.received)) == (0, 3)


async def test_another_decode_instance_is_called_if_one_is_full(start: Start) -> None:
    p, first, second = FakeInstance("prefill"), FakeInstance("decode"), FakeInstance("decode")
    first.answer = full
    front = await start([p, first, second])
    for _ in range(4):
        assert (await front.post(ask("x"))).status == 200
    assert len(second.received) == 4
    assert await front.metric("chiasm_proxy_decode_refusals_total") == len(first.received)


# Timing, metrics, health.


async def test_a_stream_has_the_timing_of_prefill_in_its_head_and_the_proxys_at_its_end(start: Start) -> None:
    front, _, _ = await begin(start)
    answer = await front.post(ask("x", stream=True))
    names = [entry.partition(";")[0] for entry in answer.headers["Server-Timing"].split(", ")]
    assert names == ["prefill_call", "proxy", "estimate", "placement", "prefill"]
    last = answer.body.split(b"\n\n")[-3].decode().removeprefix(": server-timing ")
    assert [entry.partition(";")[0] for entry in last.split(", ")] == [
        "prefill_call",
        "handover",
        "proxy",
        "estimate",
        "placement",
    ]
    answer = await front.post(ask("x"))
    assert "prefill_call;dur=" in answer.headers["Server-Timing"]
    assert "handover;dur=" in answer.headers["Server-Timing"]


async def test_handovers_and_their_gap_are_counted(start: Start) -> None:
    front, _, _ = await begin(start)
    await front.post(ask("x"))
    await listen(front, ask("x", stream=True))
    assert await front.metric("chiasm_proxy_handovers_total") == 2
    assert await front.metric("chiasm_proxy_handover_gap_seconds_count") == 1
    assert await front.metric("chiasm_proxy_prefill_retries_total") == 0


async def test_health_and_models_need_both_prefill_and_decode(start: Start) -> None:
    front, p, d = await begin(start)
    shown = (await front.get("/health")).json
    assert (shown["status"], shown["models"]) == ("ok", [MODEL])
    assert [one["role"] for one in shown["instances"]] == ["prefill", "decode"]
    assert (await front.get("/v1/models")).json["data"][0]["max_model_len"] == 4096
    for instance, code in ((p, "no_prefill"), (d, "no_decode")):
        await instance.kill()
        await front.until(instance, "unhealthy")
        assert (await front.get("/health")).status == 503
        answer = await front.post(ask("x"))
        assert (answer.status, answer.error["code"]) == (503, code)
        assert "Retry-After" in answer.headers
        await instance.start()
        await front.until(instance, "healthy")
    assert (await front.post(ask("x"))).status == 200
