"""Images in responses and messages: treated as those of a chat if the instances take names for them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from chiasm.errors import Code, InvalidRequestError
from chiasm.http.config import HttpConfig
from chiasm.proxy.other_paths import parse_other
from chiasm.wire import COUNT_TOKENS_PATH, IMAGE_PATHS, MESSAGES_PATH, RESPONSES_PATH

from .conftest import Front, Images, Start, ask, data_url, image, image_bytes, until_idle
from .instances import MODEL, VLLM, FakeInstance, Received, break_off, chat, refuse

RED, BLUE = image_bytes(), image_bytes("blue", (8, 2))
Json = dict[str, Any]
Make = Callable[..., Json]
BOTH = pytest.mark.parametrize("path", [MESSAGES_PATH, RESPONSES_PATH])


def image_of(path: str, url: str | bytes, **more: Any) -> Json:
    """Return an image as this API has it."""
    url = data_url(url) if isinstance(url, bytes) else url
    if path == RESPONSES_PATH:
        return {"type": "input_image", "image_url": url} | more
    kind, separator, data = url.partition(";base64,")
    source = {"type": "base64", "media_type": kind.removeprefix("data:"), "data": data}
    return {"type": "image", "source": source if separator else {"type": "url", "url": url}} | more


def body_of(path: str, *parts: Json, role: str = "user", **more: Any) -> Json:
    name = "input" if path == RESPONSES_PATH else "messages"
    return {"model": MODEL, name: [{"role": role, "content": list(parts)}]} | more


def result_of(path: str, *parts: Json, **more: Any) -> Json:
    """Return a body in which a tool has returned images."""
    if path == RESPONSES_PATH:
        return {
            "model": MODEL,
            "input": [{"type": "function_call_output", "call_id": "c", "output": list(parts)}],
        } | more
    return body_of(path, {"type": "tool_result", "tool_use_id": "c", "content": list(parts)}, **more)


def embeds_of(body: Any) -> list[Json]:
    """Return the parts that stand for embeddings, wherever they are, in order."""
    if isinstance(body, list):
        return [part for one in body for part in embeds_of(one)]
    if not isinstance(body, dict):
        return []
    if body.get("type") == "image_embeds":
        return [body]
    return [part for value in body.values() for part in embeds_of(value)]


async def fleet(start: Start, *roles: str, **config: Any) -> tuple[Front, list[FakeInstance]]:
    """Start instances of vLLM that take names of images."""
    instances = [FakeInstance(role, engine=VLLM["engine"], image_paths=list(IMAGE_PATHS)) for role in roles]
    for one in instances:
        if one.role != "encoder":
            one.answer = chat
    return await start(instances, **config), instances


@BOTH
@pytest.mark.parametrize("make", [body_of, result_of])
async def test_images_are_named_as_those_of_a_chat(start: Start, path: str, make: Make) -> None:
    front, (encoder, pd) = await fleet(start, "encoder", "pd")
    text = {"type": "text", "text": "and"}
    assert (await front.post(make(path, image_of(path, RED), text, image_of(path, BLUE)), path)).status == 200
    assert (await front.post(ask(image(RED), image(BLUE)))).status == 200
    other, of_chat = pd.received
    assert embeds_of(other.json) == embeds_of(of_chat.json)
    assert [part["image_embeds"]["image_size"] for part in embeds_of(other.json)] == [[4, 6], [2, 8]]
    assert {name for call in encoder.received[:2] for name in call.identifiers} == set(of_chat.identifiers)
    assert encoder.received[0].path == "/v1/chat/completions"
    assert b"base64" not in other.body


@BOTH
async def test_all_else_keeps_its_bytes(start: Start, path: str) -> None:
    front, (_, pd) = await fleet(start, "encoder", "pd")
    sent = json.dumps(body_of(path, image_of(path, RED)) | {"unknown": 0}).encode()
    assert (await front.post(sent.replace(b'"unknown": 0', b'"unknown": [1.50 ,"\\u00e9"]'), path)).status == 200
    assert b':[1.50 ,"\\u00e9"]' in pd.received[0].body


async def test_the_detail_of_an_image_is_left_for_vllm_to_check(start: Start) -> None:
    front, (_, pd) = await fleet(start, "encoder", "pd")
    await front.post(body_of(RESPONSES_PATH, image_of(RESPONSES_PATH, RED, detail="odd")), RESPONSES_PATH)
    assert embeds_of(pd.received[0].json)[0]["detail"] == "odd"


@BOTH
async def test_a_tenant_has_names_of_its_own(start: Start, path: str) -> None:
    front, (_, pd, aggregated) = await fleet(start, "encoder", "pd", "aggregated")
    body = body_of(path, image_of(path, RED))
    for salt in ("a", "b", ""):
        assert (await front.post(body | {"cache_salt": salt}, path)).status == 200
    named = [part["uuid"] for received in pd.received for part in embeds_of(received.json)]
    for received in aggregated.received:  # which has no name without a salt
        named += [
            part["uuid"] for part in received.json[next(iter(body.keys() - {"model"}))][0]["content"] if "uuid" in part
        ]
    assert len(named) == len(set(named)) >= 2


@BOTH
async def test_an_instance_that_encodes_itself_gets_the_clients_bytes_or_names(start: Start, path: str) -> None:
    front, (aggregated,) = await fleet(start, "aggregated")
    sent = json.dumps(body_of(path, image_of(path, RED))).encode()
    assert (await front.post(sent, path)).status == 200
    assert (await front.post(json.dumps(json.loads(sent) | {"cache_salt": "s"}).encode(), path)).status == 200
    assert (await front.post(ask(image(RED), cache_salt="s"))).status == 200
    plain, salted, of_chat = aggregated.received
    assert plain.body == sent
    name = "input" if path == RESPONSES_PATH else "messages"
    assert salted.json[name][0]["content"] == of_chat.json["messages"][0]["content"]


@BOTH
async def test_an_image_with_a_url_is_fetched_by_the_proxy(start: Start, images: Images, path: str) -> None:
    front, (encoder, pd) = await fleet(start, "encoder", "pd")
    url = await images(RED)
    assert (await front.post(body_of(path, image_of(path, url)), path)).status == 200
    assert (await front.post(ask(image(RED)))).status == 200
    assert embeds_of(pd.received[0].json) == embeds_of(pd.received[1].json)
    assert (images.fetched, url.encode() in pd.received[0].body + encoder.received[0].body) == (1, False)
    refused = await front.post(body_of(path, image_of(path, "file:///etc/passwd")), path)
    assert (refused.status, len(pd.received)) == (400, 2)


@BOTH
async def test_where_an_instance_takes_no_names_it_is_refused(start: Start, images: Images, path: str) -> None:
    url = await images(RED)
    other = FakeInstance("pd", engine=VLLM["engine"], image_paths=list(IMAGE_PATHS))
    front = await start([FakeInstance("encoder"), FakeInstance("pd", engine=VLLM["engine"]), other])
    for part in (image_of(path, RED), image_of(path, url)):
        refused = await front.post(body_of(path, part), path)
        assert (refused.status, refused.error["code"]) == (400, Code.MEDIA_NOT_SUPPORTED)
    salted = await front.post(body_of(path, image_of(path, RED), cache_salt="s"), path)
    assert (salted.status, salted.error["code"]) == (400, Code.NOT_KEPT_APART)
    assert (other.received, images.fetched) == ([], 0)


async def test_tokens_are_counted_without_an_encoder(start: Start) -> None:
    front, (encoder, pd) = await fleet(start, "encoder", "pd")
    await encoder.kill()
    await front.until(encoder, "unhealthy")
    assert (await front.post(body_of(MESSAGES_PATH, image_of(MESSAGES_PATH, RED)), COUNT_TOKENS_PATH)).status == 200
    assert len(embeds_of(pd.received[0].json)) == 1


@BOTH
async def test_prefill_answers_alone(start: Start, path: str) -> None:
    front, (_, prefill, decode) = await fleet(start, "encoder", "prefill", "decode")
    body = body_of(path, image_of(path, RED), max_tokens=9)
    assert (await front.post(body, path)).status == 200
    assert (len(prefill.received), decode.received, "kv_transfer_params" in prefill.received[0].json) == (1, [], False)


async def created(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
    """Answer as the API of responses does before the prompt is computed, and then never."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for kind in ("created", "in_progress"):
        await response.write(b'event: response.%b\ndata: {"type":"response.%b"}\n\n' % (kind.encode(), kind.encode()))
    await asyncio.Event().wait()
    return response


async def test_a_stream_whose_image_can_not_be_encoded_has_the_encoders_status(start: Start) -> None:
    front, (encoder, pd) = await fleet(start, "encoder", "pd")
    encoder.answer, pd.answer = refuse(400, "no image", code="invalid_image"), created
    answered = await front.post(body_of(RESPONSES_PATH, image_of(RESPONSES_PATH, RED), stream=True), RESPONSES_PATH)
    assert (answered.status, answered.error["message"]) == (400, "no image")
    await until_idle(front)


async def test_a_stream_that_breaks_off_before_the_prompt_is_computed_goes_to_another_instance(start: Start) -> None:
    front, (_, first, second) = await fleet(start, "encoder", "pd", "pd")

    async def lose(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        first.answer = second.answer = chat
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"event: response.created\ndata: {}\n\n")
        await break_off(request)
        return response

    first.answer = second.answer = lose
    answered = await front.post(body_of(RESPONSES_PATH, image_of(RESPONSES_PATH, RED), stream=True), RESPONSES_PATH)
    assert (answered.status, b"response.created" in answered.body, b"cat" in answered.body) == (200, False, True)
    assert len(first.received) + len(second.received) == 2


@BOTH
async def test_bounds_are_those_of_chats(start: Start, path: str) -> None:
    front, (encoder, pd) = await fleet(start, "encoder", "pd", max_items=2)
    parts = [image_of(path, RED)] * 3
    assert (await front.post(body_of(path, *parts), path)).error["code"] == Code.TOO_MANY_IMAGES
    bad = body_of(path, image_of(path, "data:image/png;base64,bm8gaW1hZ2U="))
    assert (await front.post(bad, path)).error["code"] == Code.INVALID_IMAGE
    many = body_of(path, *[{"type": "text", "text": "x"}] * 4096, *parts)
    assert "4096 is the limit" in (await front.post(many, path)).error["message"]
    settings = body_of(path, *parts, mm_processor_kwargs={"max_pixels": 1})
    assert (await front.post(settings, path)).error["param"] == "mm_processor_kwargs"
    assert encoder.received == pd.received == []
    await until_idle(front)


@BOTH
async def test_images_do_not_count_as_text(start: Start, path: str) -> None:
    large = image_bytes(size=(64, 64), compress_level=0)
    front, (_, pd, aggregated) = await fleet(start, "encoder", "pd", "aggregated", http=HttpConfig(max_text_bytes=8192))
    sent = json.dumps(body_of(path, image_of(path, large), {"type": "text", "text": "x"})).encode()
    for body in (sent, sent[:-1] + b',"cache_salt":"s"}'):
        assert (await front.post(body, path)).status == 200
    for received in aggregated.received:
        assert received.body == sent or len(embeds_of(received.json)) == 0
    assert len(pd.received) + len(aggregated.received) == 2
    text = body_of(path, image_of(path, RED), {"type": "text", "text": "x" * 9000, "data": "y" * 9000})
    assert (await front.post(text, path)).status == 413


@BOTH
async def test_a_prompt_that_begins_alike_is_recognized(path: str) -> None:
    large = image_bytes(size=(64, 64), compress_level=0)
    value = body_of(path, image_of(path, RED), {"type": "text", "text": "x"}, image_of(path, large))
    request = parse_other(json.dumps(value).encode(), path=path)
    first, second = request.text_before_media()
    assert (b"x" in first, b"x" in second, len(first) + len(second) < 400) == (False, True, True)


async def test_an_image_that_is_no_url_in_the_body_counts_twice(start: Start) -> None:
    large = image_bytes(size=(64, 64), compress_level=0)
    body = json.dumps(body_of(MESSAGES_PATH, image_of(MESSAGES_PATH, large))).encode()
    front, _ = await fleet(start, "encoder", "pd", max_body_bytes=len(body), max_buffered_bytes=len(body) * 3 // 2)
    answered = await front.post(body, MESSAGES_PATH)
    assert answered.status in (413, 503)
    await until_idle(front)


async def test_a_key_is_needed(start: Start) -> None:
    front, (encoder, pd) = await fleet(start, "encoder", "pd", http=HttpConfig(api_key=("k" * 16,)))
    assert (await front.post(body_of(MESSAGES_PATH, image_of(MESSAGES_PATH, RED)), MESSAGES_PATH)).status == 401
    assert encoder.received == pd.received == []


def hostile(path: str) -> list[Json]:
    """Return bodies in which an image stands where its pixels would reach an instance, or that name an embedding."""
    one, name = image_of(path, RED), "a" * 64
    embeds = {"type": "image_embeds", "image_embeds": {"image_size": [4, 6]}, "uuid": name}
    elsewhere = image_of(path, "https://a.example/x.png")
    inputs = "input" if path == RESPONSES_PATH else "messages"
    user = {"role": "user", "content": [one]}
    return [
        body_of(path, embeds),
        body_of(path, one, embeds),
        body_of(path, one | {"uuid": name}),
        body_of(path, one | {"image_embeds": {}}),
        body_of(path, {"type": "image_url", "image_url": {"url": data_url(RED)}, "uuid": name}),
        body_of(path, elsewhere, role="assistant" if path == RESPONSES_PATH else "system"),
        body_of(path, {"type": "tool_result", "content": [elsewhere]}, role="assistant"),
        body_of(path, one, {"type": "input_audio", "input_audio": {}}),
        body_of(path, one, {"type": "input_file", "file_url": "https://a.example"}),
        body_of(path, {"type": "tool_result", "content": [{"type": "tool_result", "content": [elsewhere]}]}),
        {inputs: [user, {"role": "other", "content": [elsewhere]}]},
        {inputs: [{"role": "user", "file_id": "x", "content": [one, one]}, {"type": "x", "content": [elsewhere]}]},
        {inputs: [{"role": "user", "file_id": "x", "content": [one, one]}, {"role": "user", "content": elsewhere}]},
        {"type": "function_call", inputs: [{"role": "other", "content": [elsewhere]}]},
        {inputs: [user], "conversation": {"items": [elsewhere]}},
        {inputs: [user, "text", [elsewhere]]},
        {inputs: user | {"content": [elsewhere]}},
    ]


@pytest.mark.parametrize("path", IMAGE_PATHS)
def test_no_pixels_and_no_name_of_a_client_pass(path: str) -> None:
    for value in hostile(path):
        for body in (json.dumps(value), json.dumps(value).replace("image", "\\u0069mage")):
            with pytest.raises(InvalidRequestError) as refusal:
                parse_other(body.encode(), path=path)
            assert refusal.value.code == Code.MEDIA_NOT_SUPPORTED, body


@BOTH
def test_of_a_member_that_is_given_twice_the_last_counts(path: str) -> None:
    name = "input" if path == RESPONSES_PATH else "messages"
    first, last = (json.dumps([{"role": "user", "content": [image_of(path, data)]}]) for data in (RED, BLUE))
    request = parse_other(f'{{"{name}":{first},"{name}":{last}}}'.encode(), path=path)
    assert [part.url.decode() for part in request.media] == [data_url(BLUE)]
    assert request.with_parts([b'"here"']).count(b"base64") == 0


@pytest.mark.parametrize("path", IMAGE_PATHS)
def test_images_where_vllm_reads_the_text_alone_are_not_replaced(path: str) -> None:
    inputs = "input" if path == RESPONSES_PATH else "messages"
    role = "assistant" if path == RESPONSES_PATH else "system"
    value = {
        inputs: [{"role": "user", "content": [image_of(path, RED)]}, {"role": role, "content": [image_of(path, RED)]}]
    }
    request = parse_other(json.dumps(value).encode(), path=path)
    assert (len(request.media), request.path) == (2, "")
