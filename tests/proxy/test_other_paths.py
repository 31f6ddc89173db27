"""Paths of vLLM that the proxy doesn't understand: what it passes on, byte for byte, and what it refuses."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from chiasm.errors import Code, InvalidRequestError
from chiasm.http.config import HttpConfig
from chiasm.proxy.other_paths import parse_other
from chiasm.wire import NAMED_EVENT_PATHS, OTHER_PATHS

from .conftest import Front, Start, ask, image, image_bytes
from .instances import MODEL, VLLM, Answering, FakeInstance, Received, begin_stream, break_off, full, lose, once

BODY = b'{ "model":"tiny",\n "input" : "\\u00e9 and more", "unknown": [1.50, null], "tools": [{"type":"function"}] }'
ANSWER = b'{"object" : "whatever",  "tool_calls":[{"id":"1"}], "reasoning": "because"}'
DATA_URL = f"data:image/png;base64,{base64.b64encode(image_bytes()).decode()}"


async def answer(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
    """Answer as it stands in ANSWER; in a stream, with an event of the API of responses or messages."""
    if not received.json.get("stream"):
        return web.Response(body=ANSWER, headers={"Content-Type": "application/vnd.of+json", "metadata": "m"})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    for event in EVENTS:
        await response.write(event)
    return response


EVENTS = [
    b"event: one\r\n",
    b'data: {"type":"one"}\r\n\r\n',
    b'event: error\ndata: {"error": 1}\n\ndata: [DONE]\n\nda',
    b"ta: x",
]


async def vllm(start: Start, *roles: str, **config: Any) -> tuple[Front, list[FakeInstance]]:
    instances = [FakeInstance(role, engine=VLLM["engine"]) for role in roles]
    for one in instances:
        one.answer = answer
    return await start(instances, **config), instances


@pytest.mark.parametrize("path", OTHER_PATHS)
async def test_body_and_answer_stay_as_they_are(start: Start, path: str) -> None:
    front, (pd,) = await vllm(start, "pd")
    answered = await front.post(BODY, path, **{"X-Request-Id": "mine"})
    assert (answered.status, answered.body) == (200, ANSWER)
    assert (answered.headers["content-type"], answered.headers["metadata"]) == ("application/vnd.of+json", "m")
    (received,) = pd.received
    assert (received.path, received.body, received.headers["X-Request-Id"]) == (path, BODY, "mine")


async def test_a_stream_stays_as_it_is(start: Start) -> None:
    front, _ = await vllm(start, "pd")
    answered = await front.post({"model": MODEL, "stream": True}, "/v1/messages")
    assert answered.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answered.body == b"".join(EVENTS)


@pytest.mark.parametrize("path", NAMED_EVENT_PATHS)
async def test_losing_the_instance_ends_a_stream_with_an_error_that_clients_of_the_path_know(
    start: Start, path: str
) -> None:
    """Anthropic's clients skip events without a name, and would take what they have for the whole answer."""
    front, (pd,) = await vllm(start, "pd")

    async def die(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        response = await begin_stream(request)
        await response.write(EVENTS[0] + EVENTS[1])
        await break_off(request)
        return response

    pd.answer = die
    answered = await front.post({"model": MODEL, "stream": True}, path)
    begun, last = answered.body.split(b"event: error\ndata: ")
    assert begun == EVENTS[0] + EVENTS[1]
    assert (json.loads(last)["type"], json.loads(last)["error"]["code"]) == ("error", Code.INSTANCE_LOST)


async def test_a_refusal_of_the_instance_stays_as_it_is(start: Start) -> None:
    front, (pd,) = await vllm(start, "pd")

    async def refuse(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        return web.Response(status=422, body=b'{"detail":"no"}', content_type="application/json")

    pd.answer = refuse
    answered = await front.post(BODY, "/pooling")
    assert (answered.status, answered.body) == (422, b'{"detail":"no"}')


@pytest.mark.parametrize("fault", [full, lose])
async def test_an_instance_of_vllm_that_fails_is_not_replaced_by_one_that_serves_nothing_there(
    start: Start, fault: Answering
) -> None:
    vllm, other = FakeInstance("pd", engine=VLLM["engine"]), FakeInstance("pd")
    once(fault, answer, vllm)
    front = await start([vllm, other])
    assert (await front.post(BODY, "/v1/responses")).status == 200
    assert other.received == []


async def test_a_lost_instance_is_replaced_by_another(start: Start) -> None:
    front, (first, second) = await vllm(start, "pd", "pd")

    async def lose(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        first.answer = second.answer = answer
        await break_off(request)
        raise ConnectionError

    first.answer = second.answer = lose
    assert (await front.post(BODY, "/v1/embeddings")).body == ANSWER
    assert len(first.received) + len(second.received) == 2


@pytest.mark.parametrize(
    "path",
    ["/collective_rpc", "/sleep", "/v1/load_lora_adapter", "/reset_prefix_cache", "/server_info", "/abort_requests"],
)
async def test_what_operates_an_instance_is_not_passed_on(start: Start, path: str) -> None:
    front, (pd,) = await vllm(start, "pd")
    assert (await front.post(b"{}", path)).status == 404
    assert pd.received == []


async def test_the_built_in_engine_is_named_as_what_lacks_it(start: Start) -> None:
    front = await start([FakeInstance("pd")])
    answered = await front.post(BODY, "/v1/responses")
    assert (answered.status, answered.error["code"]) == (501, Code.NOT_SERVED)
    assert answered.error["message"].startswith("/v1/responses is not served here")


async def test_beside_the_built_in_engine_vllm_gets_it(start: Start) -> None:
    own, other = FakeInstance("pd"), FakeInstance("pd", engine=VLLM["engine"])
    other.answer = answer
    front = await start([own, other])
    for _ in range(3):
        assert (await front.post(BODY, "/tokenize")).status == 200
    assert (len(own.received), len(other.received)) == (0, 3)


async def test_each_path_needs_a_key_if_the_proxy_has_any(start: Start) -> None:
    front, (pd,) = await vllm(start, "pd", http=HttpConfig(api_key=("k" * 16,)))
    assert {(await front.post(BODY, path)).status for path in OTHER_PATHS} == {401}
    assert pd.received == []


async def test_a_tenant_has_its_salt(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"keys: [{{key: {'k' * 16}, tenant: t}}]")
    front, (pd,) = await vllm(start, "pd", http=HttpConfig(api_key_file=file))
    assert (await front.post(BODY, "/v1/responses", Authorization=f"Bearer {'k' * 16}")).status == 200
    assert len(pd.received[0].json["cache_salt"]) == 64


@pytest.mark.parametrize("name", ["kv_transfer_params", "ec_transfer_params"])
async def test_what_only_the_fleet_may_give_is_refused(start: Start, name: str) -> None:
    front, (pd,) = await vllm(start, "pd")
    answered = await front.post({"model": MODEL, name: {"do_remote_decode": True}}, "/v1/messages")
    assert (answered.status, answered.error["param"], pd.received) == (400, name, [])


@pytest.mark.parametrize("name", ["kv_transfer_params", "ec_transfer_params"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
async def test_nor_is_it_taken_among_what_vllm_puts_beside_it(start: Start, path: str, name: str) -> None:
    front, (pd,) = await vllm(start, "pd")
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "prompt": "x", "input": "x"}
    answered = await front.post(body | {"vllm_xargs": {"mine": 1, name: "x"}}, path)
    assert (answered.status, answered.error["param"], pd.received) == (400, f"vllm_xargs.{name}", [])
    assert (await front.post(body | {"vllm_xargs": {"mine": [1, "a"]}}, path)).status == 200


def in_messages(url: str) -> dict[str, Any]:
    kind, _, data = url.partition(";base64,")
    source = {"type": "base64", "media_type": kind.removeprefix("data:"), "data": data}
    return {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "image", "source": source}]}]}


def in_responses(url: str) -> dict[str, Any]:
    return {"model": MODEL, "input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]}


@pytest.mark.parametrize("body", [in_messages(DATA_URL), in_responses(DATA_URL)], ids=["messages", "responses"])
async def test_images_go_to_an_instance_that_encodes_itself_and_to_no_other(start: Start, body: dict[str, Any]) -> None:
    front, (encoder, pd) = await vllm(start, "encoder", "pd")
    refused = await front.post(body, "/v1/responses")
    assert (refused.status, refused.error["code"]) == (400, Code.MEDIA_NOT_SUPPORTED)
    assert "/v1/chat/completions" in refused.error["message"]
    assert encoder.received == pd.received == []
    front, (aggregated, pd) = await vllm(start, "aggregated", "pd")
    sent = json.dumps(body).encode()
    assert (await front.post(sent, "/v1/responses")).status == 200
    assert ([received.body for received in aggregated.received], pd.received) == ([sent], [])


async def test_an_image_in_one_of_several_chats_is_found(start: Start) -> None:
    chats = [[{"role": "user", "content": "x"}], ask(image(image_bytes()))["messages"]]
    front, (aggregated, pd) = await vllm(start, "aggregated", "pd")
    assert (await front.post({"messages": chats}, "/v1/chat/completions/batch")).status == 200
    assert (len(aggregated.received), pd.received) == (1, [])
    salted = await front.post({"messages": chats, "cache_salt": "s"}, "/v1/chat/completions/batch")
    assert (salted.status, salted.error["code"]) == (400, Code.NOT_KEPT_APART)


@pytest.mark.parametrize("make", [in_messages, in_responses])
async def test_a_bad_image_reaches_no_instance(start: Start, make: Any) -> None:
    front, (aggregated,) = await vllm(start, "aggregated")
    answered = await front.post(make("data:image/png;base64,bm8gaW1hZ2U="), "/v1/responses")
    assert (answered.status, answered.error["code"], aggregated.received) == (400, Code.INVALID_IMAGE, [])


@pytest.mark.parametrize(
    "value",
    [
        {"input": [{"content": [{"type": "input_image", "image_url": "https://a.example/x.png"}]}]},
        {"input": [{"content": [{"type": "input_image", "file_id": "f"}]}]},
        {
            "input": [
                {"type": "function_call_output", "output": [{"type": "input_file", "file_url": "https://a.example"}]}
            ]
        },
        {"messages": [{"content": [{"image_url": {"url": DATA_URL}}]}]},
        {"messages": [{"content": [{"type": "image", "source": {"type": "url", "url": "https://a.example/x.png"}}]}]},
        {"messages": [{"content": [{"type": "image_embeds", "image_embeds": {}, "uuid": "0" * 64}]}]},
        {"messages": [{"content": [{"type": "image_url", "image_url": {"url": DATA_URL}, "uuid": "0" * 64}]}]},
        {"messages": [{"content": [{"type": "tool_result", "content": [{"type": "document", "source": {}}]}]}]},
        {"messages": [{"content": [{"type": "video_url", "video_url": {"url": "https://a.example"}}]}]},
        {"data_1": {"content": [{"type": "input_audio", "input_audio": {}}]}},
        {"images": [DATA_URL]},
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_all_other_media_are_refused_wherever_they_are(value: dict[str, Any]) -> None:
    escaped = json.dumps(value).replace("image", "\\u0069mage").encode()
    for body in (json.dumps(value).encode(), escaped):
        with pytest.raises(InvalidRequestError) as refusal:
            parse_other(body, path="/pooling")
        assert refusal.value.code == Code.MEDIA_NOT_SUPPORTED


@pytest.mark.parametrize(
    "value",
    [
        {"tools": [{"parameters": {"properties": {"image_url": {"type": "string"}}}}]},
        {"messages": [{"content": [{"type": "tool_use", "input": {"image_url": "https://a.example"}}]}]},
        {"input": "an image_url and a file", "documents": ["a document"]},
        {"metadata": {"file_id": "f"}},
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_words_and_schemas_are_no_media(value: dict[str, Any]) -> None:
    assert parse_other(json.dumps(value).encode(), path="/pooling").media == []


def test_a_deeply_nested_body_with_an_image_is_looked_through() -> None:
    body = b'{"input": %b{"type": "input_image"}%b}' % (b"[" * 500, b"]" * 500)
    with pytest.raises(InvalidRequestError):
        parse_other(body, path="/pooling")
