"""Prefill and decode of vLLM: decode answers from the first token, with the KV that prefill has computed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web

from .conftest import Start, ask, image, image_bytes, listen, until_idle
from .instances import (
    SAID,
    VLLM,
    VLLM_HANDLE,
    WORDS,
    Answering,
    FakeInstance,
    Received,
    begin_stream,
    break_off,
    decode_of_vllm,
    event,
    full,
    lose,
    once,
    only_a_head,
    prefill_of_vllm,
    refuse,
    role_event,
    vllm_decode,
    vllm_error_event,
    vllm_prefill,
)

PREFILL_PARAMS = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


# How a request flows.


async def test_prefill_computes_the_prompt_and_decode_answers(start: Start) -> None:
    p, d = vllm_prefill(), vllm_decode()
    front = await start([p, d])
    body = ask("x", temperature=0.5, seed=3, stop=["."], min_tokens=4, max_tokens=20)
    answer = await front.post(body)
    assert answer.json["choices"][0]["message"]["content"] == SAID
    assert p.received[0].json == body | {
        "stream": False,
        "stream_options": None,
        "max_tokens": 1,
        "max_completion_tokens": 1,
        "min_tokens": 0,
        "kv_transfer_params": PREFILL_PARAMS,
    }
    handle = VLLM_HANDLE | {"remote_engine_id": p.url, "remote_request_id": "r1"}
    assert d.received[0].json == body | {"kv_transfer_params": handle}
    assert await front.metric("chiasm_proxy_handovers_total") == 1
    await until_idle(front)


async def test_a_stream_comes_from_decode_from_its_first_token(start: Start) -> None:
    p, d = vllm_prefill(), vllm_decode()
    front = await start([p, d])
    heard = await listen(front, ask("x", stream=True, stream_options={"include_usage": True}))
    assert (heard.words, heard.ended) == (list(WORDS), True)
    assert p.received[0].json["stream"] is False
    assert p.received[0].json["stream_options"] is None
    assert d.received[0].json["stream_options"] == {"include_usage": True}
    await until_idle(front)


async def test_a_text_completion(start: Start) -> None:
    p, d = vllm_prefill(), vllm_decode()
    front = await start([p, d])
    body = {"model": "tiny", "prompt": [1, 2, 3]}
    assert (await front.post(body, path="/v1/completions")).status == 200
    assert [len(one.received) for one in (p, d)] == [1, 1]
    assert p.received[0].json["max_tokens"] == 1
    assert "max_completion_tokens" not in p.received[0].json


async def test_prefill_and_decode_get_placeholders_for_an_image(start: Start) -> None:
    encoder, p, d = FakeInstance("encoder", **VLLM), vllm_prefill(), vllm_decode()
    front = await start([encoder, p, d])
    assert (await front.post(ask("x", image(image_bytes(size=(6, 4)))))).status == 200
    for one in (p, d):
        assert one.received[0].parts[1]["image_embeds"] == {"image_size": [4, 6]}
        assert one.received[0].identifiers == encoder.received[0].identifiers
    await until_idle(front)


async def test_a_decode_instance_that_cannot_size_an_image_gets_the_encoders_metadata(start: Start) -> None:
    encoder, p = FakeInstance("encoder"), vllm_prefill()
    d = FakeInstance("decode", takes_image_size=False, **VLLM)
    d.answer = decode_of_vllm
    front = await start([encoder, p, d])
    assert (await front.post(ask("x", image(image_bytes())))).status == 200
    assert d.received[0].parts[1]["image_embeds"] == {"image_grid_thw": [1, 4, 6]}


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 1},
        {"max_completion_tokens": 1, "max_tokens": 9},
        {"n": 2},
        {"prompt_logprobs": 1},
        {"echo": True},
        {"use_beam_search": True},
    ],
)
@pytest.mark.parametrize("media", [False, True])
async def test_prefill_answers_alone_what_decode_cannot_answer(
    start: Start, options: dict[str, Any], media: bool
) -> None:
    encoder, p, d = FakeInstance("encoder"), vllm_prefill(), vllm_decode()
    front = await start([encoder, p, d])
    body = ask("x", *([image(image_bytes())] if media else []), **options)
    assert (await front.post(body)).json["choices"][0]["message"]["content"] == "a cat"
    assert "kv_transfer_params" not in p.received[0].json
    assert p.received[0].json | {"messages": []} == body | {"messages": []}
    assert not d.received


@pytest.mark.parametrize(
    ("prompt", "calls"),
    [(["one"], 1), (["one", "two"], 0), ([[1, 2]], 1), ([[1, 2], [3]], 0), ([1, 2], 1), ("one", 1), ([], 1)],
)
async def test_prefill_answers_several_prompts_alone(start: Start, prompt: Any, calls: int) -> None:
    p, d = vllm_prefill(), vllm_decode()
    front = await start([p, d])
    assert (await front.post({"model": "tiny", "prompt": prompt}, path="/v1/completions")).status == 200
    assert len(d.received) == calls


# Which instances fit together.


async def test_prefill_and_decode_of_different_engines_do_not_mix(start: Start) -> None:
    p, d, other = vllm_prefill(), vllm_decode(), FakeInstance("decode", kv_connector="NixlConnector")
    front = await start([p, d, other])
    shown = {one["url"]: one for one in (await front.get("/health")).json["instances"]}[other.url]
    assert shown["state"] == "mismatched"
    assert (
        shown["reason"] == "it moves KV with NixlConnector of chiasm, but the fleet with NixlConnector of vllm 0.32.0"
    )
    for _ in range(2):
        assert (await front.post(ask("x"))).status == 200
    assert not other.received


async def test_the_engine_of_an_encoder_does_not_matter(start: Start) -> None:
    encoder, p, d = FakeInstance("encoder", engine="vllm 0.32.0"), FakeInstance("prefill"), FakeInstance("decode")
    front = await start([encoder, p, d], probe_interval_seconds=60)
    assert set((await front.states()).values()) == {"healthy"}
    assert (await front.post(ask(image(image_bytes()), stream=True))).status == 200
    assert p.received[0].params == {"do_remote_decode": True, "continues": True}


async def test_a_prefill_answer_without_a_handle_is_an_error(start: Start) -> None:
    async def plain(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        return web.json_response({"choices": [], "kv_transfer_params": None})

    p, d = vllm_prefill(), vllm_decode()
    p.answer = plain
    front = await start([p, d])
    answer = await front.post(ask("x"))
    assert answer.status == 502
    assert "kv_transfer_params" in answer.error["message"]


# Decode is lost.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("first", [lose, only_a_head, vllm_error_event])
async def test_losing_decode_before_its_first_event_costs_a_prefill(
    start: Start, first: Answering, stream: bool
) -> None:
    """A handle serves one decode instance: prefill frees the blocks once they have been read."""
    encoder, p, ds = FakeInstance("encoder"), vllm_prefill(), [vllm_decode(), vllm_decode()]
    once(first, decode_of_vllm, *ds)
    front = await start([encoder, p, *ds])
    body = ask("x", image(image_bytes()), stream=stream)
    if stream:
        assert (await listen(front, body)).text == SAID
    else:
        assert (await front.post(body)).json["choices"][0]["message"]["content"] == SAID
    calls = [received.params["remote_request_id"] for d in ds for received in d.received]
    assert sorted(calls) == ["r1", "r2"]
    assert len(encoder.received) == 1
    await until_idle(front)


@pytest.mark.parametrize("at", ["prefill", "decode"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_instance_that_is_stopping_is_replaced_by_another(start: Start, at: str, stream: bool) -> None:
    ps, ds = [vllm_prefill(), vllm_prefill()], [vllm_decode(), vllm_decode()]
    stopping = refuse(503, "This instance is stopping.", kind="overloaded_error", code="stopping")
    once(stopping, prefill_of_vllm if at == "prefill" else decode_of_vllm, *(ps if at == "prefill" else ds))
    front = await start([*ps, *ds])
    body = ask("x", stream=stream)
    if stream:
        assert (await listen(front, body)).text == SAID
    else:
        assert (await front.post(body)).json["choices"][0]["message"]["content"] == SAID
    assert sum(len(one.received) for one in ps) == 2
    assert sum(len(one.received) for one in ds) == (1 if at == "prefill" else 2)
    await until_idle(front)


async def test_losing_decode_later_ends_the_stream(start: Start) -> None:
    seen = asyncio.Event()

    async def half(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        response = await begin_stream(request)
        await response.write(role_event() + event(WORDS[0]))
        await seen.wait()
        await break_off(request)
        return response

    p, ds = vllm_prefill(), [vllm_decode(), vllm_decode()]
    for d in ds:
        d.answer = half
    front = await start([p, *ds])
    heard = await listen(front, ask("x", stream=True), {1: seen})
    assert heard.text == WORDS[0]
    assert heard.error is not None
    assert not heard.ended
    assert len(p.received) == 1
    await until_idle(front)


@pytest.mark.parametrize("answer", [refuse(400, "no"), full])
async def test_a_refusal_of_decode_reaches_the_client(start: Start, answer: Answering) -> None:
    p, d = vllm_prefill(), vllm_decode()
    d.answer = answer
    front = await start([p, d])
    assert (await front.post(ask("x"))).status in {400, 503}
    assert [len(one.received) for one in (p, d)] == [1, 1]


async def test_a_request_is_refused_without_a_decode_instance(start: Start) -> None:
    p, d = vllm_prefill(), vllm_decode()
    d.answer = lose
    front = await start([p, d])
    answer = await front.post(ask("x"))
    assert answer.status == 502
    await d.kill()
    answer = await front.post(ask("x"))
    assert (answer.status, answer.error["code"]) == (503, "no_decode")
