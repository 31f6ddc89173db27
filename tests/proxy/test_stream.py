"""Streams: passed on as raw bytes in whole events, and ended by an error event if an instance is lost."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.proxy.job import Timing
from chiasm.proxy.relay import EventRelay, PartRelay
from chiasm.proxy.upstream import UpstreamError

from .conftest import Start, ask, image, image_bytes
from .instances import FakeInstance, Received, event, never, refuse


async def test_a_stream_passes_unchanged_except_for_the_proxys_timing_before_its_end(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd])
    answer = await front.post(ask("x", image(image_bytes()), stream=True))
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/event-stream"
    assert "queue;dur=1.5" in answer.headers["Server-Timing"]
    head = event("a ") + event("cat") + b": server-timing prefill;dur=3\n\n"
    assert answer.body.startswith(head + b": server-timing ")
    assert answer.body.endswith(b"\n\ndata: [DONE]\n\n")
    own = answer.body.removeprefix(head).split(b"\n\n")[0]
    assert b"proxy;dur=" in own


async def test_the_openai_client_reads_it(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd])
    stream = await front.openai.chat.completions.create(**ask("x", image(image_bytes())), stream=True)
    assert [chunk.choices[0].delta.content async for chunk in stream] == ["a ", "cat"]


async def test_chunks_are_passed_on_as_they_arrive(start: Start) -> None:
    pd = FakeInstance("pd")
    seen = asyncio.Event()

    async def slowly(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(event("one"))
        await seen.wait()
        await response.write(event("two") + b"data: [DONE]\n\n")
        return response

    pd.answer = slowly
    front = await start([pd])
    words = []
    async for chunk in await front.openai.chat.completions.create(**ask("x"), stream=True):
        words.append(chunk.choices[0].delta.content)
        seen.set()
    assert words == ["one", "two"]


async def test_a_refusal_is_not_a_stream(start: Start) -> None:
    pd = FakeInstance("pd")
    pd.answer = refuse(400, "max_tokens must be positive")
    front = await start([pd])
    answer = await front.post(ask("x", stream=True))
    assert answer.status == 400
    assert answer.error["message"] == "max_tokens must be positive"


@pytest.mark.parametrize("partial", [b"", b'data: {"choices": [{"de'])
async def test_losing_pd_during_a_stream_ends_it_with_an_error_event(start: Start, partial: bytes) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    cut = asyncio.Event()

    async def die(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(event("one") + partial)
        await cut.wait()
        assert request.transport is not None
        request.transport.abort()
        return response

    pd.answer = die
    front = await start([encoder, pd])
    words = []

    async def listen() -> None:
        async for chunk in await front.openai.chat.completions.create(**ask("x", image(image_bytes())), stream=True):
            words.append(chunk.choices[0].delta.content)
            cut.set()

    with pytest.raises(openai.APIError) as caught:
        await listen()
    assert words == ["one"]
    assert "connection to an instance was lost" in caught.value.message

    cut.set()
    answer = await front.post(ask("x", stream=True))
    events = answer.body.split(b"\n\n")
    assert events[0] + b"\n\n" == event("one")
    assert set(json.loads(events[-2].removeprefix(b"data: "))["error"]) == {"message", "type", "param", "code"}
    assert b"[DONE]" not in answer.body


async def test_losing_pd_before_its_first_event_is_an_error_status(start: Start) -> None:
    pd = FakeInstance("pd")

    async def die(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        assert request.transport is not None
        request.transport.abort()
        return response

    pd.answer = die
    front = await start([pd])
    answer = await front.post(ask("x", stream=True))
    assert answer.status == 502
    assert answer.error["type"] == "upstream_error"


async def test_a_deadline_in_a_stream_is_an_error_event(start: Start) -> None:
    pd = FakeInstance("pd")

    async def stall(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(event("one"))
        return await never(instance, request, received)

    pd.answer = stall
    front = await start([pd], deadline_seconds=3.0)
    answer = await front.post(ask("x", stream=True))
    assert answer.status == 200
    assert answer.body.startswith(event("one") + b'data: {"error":')
    assert b"deadline" in answer.body
    await asyncio.wait_for(pd.gone.acquire(), 60)


async def test_a_stream_without_done_ends_with_the_proxys_timing(start: Start) -> None:
    pd = FakeInstance("pd")

    async def bare(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(event("one") + b"data: rest")
        return response

    pd.answer = bare
    front = await start([pd])
    body = (await front.post(ask("x", stream=True))).body
    assert body.startswith(event("one") + b"data: rest\n\n: server-timing ")


def relay() -> EventRelay:
    return EventRelay(Timing().comment)


@settings(deadline=None)
@given(st.data())
def test_only_whole_events_are_passed_on_however_the_stream_is_split(data: st.DataObject) -> None:
    end = data.draw(st.sampled_from([b"\n\n", b"\r\n\r\n"]))
    events = [b"data: " + word.encode() + end for word in data.draw(st.lists(st.sampled_from("abc"), max_size=5))]
    stream = b"".join(events) + b"data: [DONE]" + end
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    one, sent = relay(), []
    for begin, finish in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        sent.append(one.pass_on(stream[begin:finish]))
        assert not sent[-1] or sent[-1].endswith(end)
    sent.append(one.finish())
    comment = Timing().comment()
    assert b"".join(sent) == b"".join(events) + comment + b"data: [DONE]" + end


@settings(deadline=None)
@given(st.data())
def test_a_stream_ends_with_an_error_as_a_failure_even_if_done_follows(data: st.DataObject) -> None:
    end = data.draw(st.sampled_from([b"\n\n", b"\r\n\r\n"]))
    wanted = event('data: {"error": 1}').removesuffix(b"\n\n") + end + b'data: {"error": {"message": "lost"}}' + end
    stream = wanted + event("more") + b"data: [DONE]" + end
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    one, sent = relay(), []
    for begin, finish in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        sent.append(one.pass_on(stream[begin:finish]))
    sent.append(one.finish())
    assert b"".join(sent) == wanted


def test_an_incomplete_event_is_held_back() -> None:
    assert relay().pass_on(b"data: a\n\ndata: b") == b"data: a\n\n"


def test_an_event_that_never_ends_is_passed_on_in_pieces() -> None:
    one = relay()
    assert one.pass_on(bytes(16 << 20)) == b""
    assert len(one.pass_on(b"x")) == (16 << 20) + 1


# What prefill and decode tell the proxy in their streams.

_TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=4)
_WORDS = st.sampled_from(
    ["a", ": tokens 5", "\n: tokens 6\n", ": kv_transfer_params {}", "\u2028: tokens 7", '"finish_reason":"x"']
)
_BLOCKS = st.lists(st.tuples(st.none() | _TOKENS, st.none() | _WORDS), max_size=6)


def announced(tokens: list[int] | None) -> bytes:
    return b"" if tokens is None else b": tokens" + b"".join(b" %d" % one for one in tokens) + b"\n"


@settings(deadline=None, max_examples=300)
@given(_BLOCKS, st.booleans(), st.booleans(), st.data())
def test_comments_for_the_proxy_are_taken_out_however_the_stream_is_split(
    blocks: list[tuple[list[int] | None, str | None]], with_handle: bool, with_returns: bool, data: st.DataObject
) -> None:
    """Each block announces tokens, or has text (which may look like an announcement), or both."""
    blocks = [block for block in blocks if block != (None, None)]
    texts = [
        b"" if word is None else b"data: " + json.dumps({"choices": [word]}).encode() + b"\n" for _, word in blocks
    ]
    stream = b"".join(announced(tokens) + text + b"\n" for (tokens, _), text in zip(blocks, texts, strict=True))
    wanted = b"".join(text + b"\n" for text in texts if text)
    if with_handle:
        stream += b': kv_transfer_params {"a": [1, 2],"output_token_ids":[3]}\n\n'
    if with_returns:
        stream, wanted = stream.replace(b"\n", b"\r\n"), wanted.replace(b"\n", b"\r\n")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    one, sent, token_ids = PartRelay(), b"", []
    for begin, finish in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        sent += one.pass_on(stream[begin:finish])
        assert not sent or sent.endswith(b"\r\n\r\n" if with_returns else b"\n\n")
        assert wanted.startswith(sent)
        token_ids += one.take_token_ids()
    assert sent + one.finish() == wanted
    assert token_ids == [token for tokens, _ in blocks for token in tokens or ()]
    handle = {name: bytes(value) for name, value in one.handle.items()} if one.handle is not None else None
    assert handle == ({"a": b"[1, 2]", "output_token_ids": b"[3]"} if with_handle else None)
    assert one.failure is None


def test_other_comments_are_passed_on() -> None:
    one = PartRelay()
    stream = b": tokens x\n\n: tokens\tof mine\n\n: server-timing a;dur=1\ndata: b\n\n: kv_transfer_params []\n\n"
    assert one.pass_on(stream) == stream
    assert one.take_token_ids() == []
    assert one.handle is None


@pytest.mark.parametrize(
    ("error", "gives_up"),
    [
        ({"type": "kv_unavailable_error", "code": None}, True),
        ({"type": "x", "code": "kv_unavailable"}, True),
        ({"type": "x", "code": "preempted"}, True),
        ({"type": "overloaded_error", "code": "stopping"}, True),
        ({"type": "timeout_error", "code": "deadline_exceeded"}, False),
        ({"type": "internal_error", "code": 500}, False),
        ("broken", False),
    ],
)
def test_errors_after_which_another_instance_can_continue_are_held_back(error: object, gives_up: bool) -> None:
    one = PartRelay()
    told = b"data: " + json.dumps({"error": error}).encode() + b"\n\n"
    passed = one.pass_on(b"data: a\n\n" + told + b"data: [DONE]\n\n")
    assert (one.failure is not None) is gives_up
    assert passed == b"data: a\n\n" + (b"" if gives_up else told + b"data: [DONE]\n\n")


def test_a_handle_that_is_not_an_object_is_an_error() -> None:
    with pytest.raises(UpstreamError, match="kv_transfer_params"):
        PartRelay().pass_on(b": kv_transfer_params {1}\n\n")
