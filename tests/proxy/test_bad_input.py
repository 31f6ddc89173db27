"""Invalid requests: each gets a clear error, and none reaches an instance."""

from __future__ import annotations

import asyncio
import struct
import zlib
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web

from chiasm.http.config import HttpConfig
from chiasm.media import MediaConfig

from .conftest import LOOPBACK, Front, Start, ask, data_url, image, image_bytes
from .instances import MODEL, FakeInstance, never, refuse

BOMB = (
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
    + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    + struct.pack(">I", zlib.crc32(b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)))
    + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"
)


@pytest.fixture
async def front(start: Start) -> Front:
    return await start([FakeInstance("encoder"), FakeInstance("pd")], max_items=3)


async def refused(front: Front, body: Any, status: int = 400, path: str = "/v1/chat/completions") -> dict[str, Any]:
    """Return the error, after checking that the next request succeeds."""
    answer = await front.post(body, path)
    assert answer.status == status, answer.body
    assert answer.headers["Content-Type"] == "application/json"
    assert not any(instance.received for instance in front.instances)
    error = answer.error
    assert len(error["message"]) < 500
    assert (await front.post(ask("x", image(image_bytes())))).status == 200
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"no json",
        b"\xff\xfe",
        b'{"model":"tiny","messages":[],"x":' + b"[" * 100_000,
        b'{"model":"tiny","messages":[{"x":' + b'{"a":' * 50_000,
        b'{"model":"tiny","messages":[{"role":"user","content":"x"}]} trailing',
        b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"a":NaN}',
    ],
)
async def test_a_body_that_is_not_json_is_refused(front: Front, body: bytes) -> None:
    assert (await refused(front, body))["code"] == "invalid_json"
    assert (await front.post(body, "/v1/completions")).status == 400


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ([], None),
        ("x", None),
        ({}, "messages"),
        ({"model": MODEL}, "messages"),
        ({"model": MODEL, "messages": []}, "messages"),
        ({"model": MODEL, "messages": {}}, "messages"),
        ({"model": MODEL, "messages": ["x"]}, "messages"),
        ({"model": MODEL, "messages": [{"role": "user", "content": 1}]}, "messages"),
        ({"model": MODEL, "messages": [{"role": "user", "content": {"type": "text"}}]}, "messages"),
        ({"model": MODEL, "messages": [{"role": "user", "content": ["x"]}]}, "messages"),
        ({"model": MODEL, "messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages"),
        (ask({"type": "image_url"}), "messages"),
        (ask({"type": "image_url", "image_url": None, "uuid": "a" * 64}), "messages"),
        (ask({"type": "image_url", "image_url": {}}), "messages"),
        (ask({"type": "image_url", "image_url": {"url": None}}), "messages"),
        (ask({"type": "image_url", "image_url": {"url": 1}}), "messages"),
        (ask({"image_url": {"url": "http://127.0.0.1/"}}), "messages"),
        (ask({"type": "image_embeds", "image_embeds": "x"}), "messages"),
        (ask({"type": "video_url", "video_url": {"url": "http://127.0.0.1/"}}), "messages"),
        (ask({"type": "input_audio", "input_audio": {}}), "messages"),
        (ask({"type": "input_image", "image_url": "http://127.0.0.1/"}), "messages"),
        (ask({"type": "x" * 10_000}), "messages"),
        (ask("x", stream="yes"), "stream"),
        (ask("x", model=3), "model"),
        (ask("x", cache_salt=3), "cache_salt"),
        (ask("x", ec_transfer_params={"a": 1}), "ec_transfer_params"),
        (ask("x", kv_transfer_params={"do_remote_prefill": True}), "kv_transfer_params"),
        (ask(image(image_bytes()), mm_processor_kwargs={"size": 1}), "mm_processor_kwargs"),
        (ask(image(image_bytes()), media_io_kwargs={"image": {}}), "media_io_kwargs"),
    ],
)
async def test_a_body_that_is_not_a_request_is_refused(front: Front, body: Any, param: str | None) -> None:
    error = await refused(front, body)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("input_image", '{"type": "image_url"'),
        ("image_embeds", '{"type": "image_url"'),
        ("input_audio", "Audio is not supported"),
        ("video_url", "Video is not supported"),
        ("file", "Files are not supported"),
        ("wonder", "text and image_url"),
    ],
)
async def test_content_parts_of_other_types_are_refused_with_advice(front: Front, kind: str, advice: str) -> None:
    error = await refused(front, ask("x", {"type": kind, kind: {}}))
    assert f"content[1] has the type {kind!r}" in error["message"]
    assert advice in error["message"]


async def test_empty_transfer_parameters_are_accepted(front: Front) -> None:
    assert (await front.post(ask("x", ec_transfer_params=None, kv_transfer_params={}))).status == 200


async def test_an_unknown_model_is_refused(front: Front) -> None:
    error = await refused(front, ask("x", model="other"), 404)
    assert error["code"] == "model_not_found"
    assert "tiny" in error["message"]
    assert (await front.post({"model": "other", "prompt": "x"}, "/v1/completions")).status == 404
    assert (await front.post({"prompt": "x"}, "/v1/completions")).status == 200


async def test_unknown_routes_and_methods_are_refused_in_the_same_shape(front: Front) -> None:
    assert (await front.post({}, "/v1/images/generations")).error["type"] == "not_found_error"
    answer = await front.get("/v1/chat/completions")
    assert answer.status == 405
    assert answer.error["message"]


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://169.254.169.254/latest/meta-data", "media_address_not_allowed"),
        ("http://[::1]:80/", "media_address_not_allowed"),
        ("http://no-such-host.invalid/a.png", "media_unreachable"),
        ("file:///etc/passwd", "media_path_not_allowed"),
        ("gopher://127.0.0.1/", "invalid_url"),
        ("", "invalid_url"),
        ("data:image/png;base64,####", "invalid_base64"),
        (data_url(b"<html>"), "invalid_image"),
        (data_url(image_bytes()[:20]), "invalid_image"),
        (data_url(BOMB), "image_too_large"),
        (data_url(b""), "invalid_image"),
    ],
)
async def test_urls_that_hold_no_usable_image_are_refused(front: Front, url: str, code: str) -> None:
    assert (await refused(front, ask("x", image(url))))["code"] == code


async def test_a_url_that_is_not_utf8_is_refused(front: Front) -> None:
    body = b'{"model":"tiny","messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"http://\xff/"}}]}]}'
    assert (await front.post(body)).status == 400


@pytest.mark.parametrize("kind", ["missing", "slow", "endless", "page", "loop", "inside"])
async def test_urls_that_cannot_be_fetched_are_refused(start: Start, kind: str) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if kind == "missing":
            return web.Response(status=404)
        if kind == "page":
            return web.Response(text="<html>")
        if kind == "loop":
            raise web.HTTPFound(request.path)
        if kind == "inside":
            raise web.HTTPFound("http://169.254.169.254/")
        if kind == "slow":
            await asyncio.Event().wait()
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(1024))

    application = web.Application()
    application.router.add_get("/", answer)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    media = MediaConfig(
        allowed_media_networks=LOOPBACK, fetch_timeout_seconds=0.5 if kind == "slow" else 20, max_media_bytes=20_000
    )
    front = await start([FakeInstance("encoder"), FakeInstance("pd")], media=media)
    try:
        error = await refused(front, ask("x", image(f"http://127.0.0.1:{runner.addresses[0][1]}/")))
        wanted = {
            "slow": "media_timeout",
            "endless": "media_too_large",
            "page": "invalid_image",
            "inside": "media_address_not_allowed",
        }
        assert error["code"] == wanted.get(kind, "media_unreachable")
    finally:
        await runner.cleanup()


async def test_one_bad_image_fails_the_request(front: Front) -> None:
    error = await refused(front, ask(image(image_bytes("red")), image("http://[::1]/"), image(image_bytes("blue"))))
    assert error["code"] == "media_address_not_allowed"


async def test_more_images_than_the_limit_are_refused(front: Front) -> None:
    error = await refused(front, ask(*(image(image_bytes(size=(5, n))) for n in range(1, 5))))
    assert error["code"] == "too_many_images"
    assert (await front.post(ask(*(image(image_bytes(size=(5, n))) for n in range(1, 4))))).status == 200


async def test_a_lower_limit_of_an_instance_applies_too(start: Start) -> None:
    front = await start([FakeInstance("encoder"), FakeInstance("pd", max_items=1)])
    assert (await refused(front, ask(image(image_bytes("red")), image(image_bytes("blue")))))[
        "code"
    ] == "too_many_images"


@pytest.mark.parametrize(
    "uuid", ["", "../" * 21 + "a", "a/b", "..", "\0", "a" * 63 + "\0", "a" * 10_000, "A" * 64, 7, [], {}, "é" * 64]
)
async def test_a_uuid_is_64_hex_digits_or_nothing(front: Front, uuid: Any) -> None:
    assert (await refused(front, ask(image(image_bytes(), uuid=uuid))))["code"] == "invalid_uuid"


async def test_a_uuid_may_be_null(front: Front) -> None:
    assert (await front.post(ask(image(image_bytes(), uuid=None)))).status == 200


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_that_is_too_large_is_refused(start: Start, announced: bool) -> None:
    front = await start([FakeInstance("pd")], max_body_bytes=10_000)

    async def endless() -> Any:
        for _ in range(200):
            yield b" " * 1000

    body: Any = b" " * 200_000 if announced else endless()
    async with front.session.post(f"{front.url}/v1/chat/completions", data=body) as response:
        assert response.status == 413
        assert (await response.json())["error"]["code"] == "body_too_large"
    assert (await front.post(ask("x"))).status == 200
    assert front.service.admission.held_bytes == 0


async def test_a_body_that_does_not_arrive_times_out(start: Start) -> None:
    front = await start([FakeInstance("pd")], http=HttpConfig(body_timeout_seconds=0.2))
    host, port = front.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
    assert b" 408 " in await reader.readline()
    writer.close()


async def test_an_error_of_pd_reaches_the_client(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    pd.answer = refuse(400, "the prompt is longer than the context", **{"X-Inner": "1"})
    encoder.answer = never
    front = await start([encoder, pd])
    for body in (ask("x"), ask("x", stream=True), ask("x", image(image_bytes()))):
        answer = await front.post(body)
        assert answer.status == 400
        assert answer.error["message"] == "the prompt is longer than the context"
        assert "X-Inner" not in answer.headers
    await asyncio.wait_for(encoder.gone.acquire(), 60)  # it isn't needed any more
    pd.answer = refuse(429, "slow down", **{"Retry-After": "7", "X-Should-Retry": "false"})
    answer = await front.post(ask("x"))
    assert answer.status == 429
    assert (answer.headers["Retry-After"], answer.headers["X-Should-Retry"]) == ("7", "false")


async def test_an_encoders_refusal_reaches_the_client(start: Start) -> None:
    encoders, pd = [FakeInstance("encoder"), FakeInstance("encoder")], FakeInstance("pd")
    for encoder in encoders:
        encoder.answer = refuse(400, "the PNG image is cut off or broken")
    pd.answer = never
    front = await start([*encoders, pd])
    for stream in (False, True):
        answer = await front.post(ask("x", image(image_bytes()), stream=stream))
        assert answer.status == 400
        assert answer.error["message"] == "the PNG image is cut off or broken"
        await asyncio.wait_for(pd.gone.acquire(), 60)
    assert sum(len(encoder.received) for encoder in encoders) == 2  # no second try


async def test_the_openai_client_understands_errors(front: Front) -> None:
    client = front.openai
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(**(ask("x") | {"model": "other"}))
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(**ask(image("http://[::1]/")))
    assert bad.value.code == "media_address_not_allowed"
    assert (await client.chat.completions.create(**ask("x"))).choices[0].message.content == "a cat"
    assert [model.id async for model in await client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other")


async def test_a_bug_in_the_proxy_is_a_500_without_details(
    front: Front, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front.service.router, "answer", None)
    answer = await front.post(ask("x"))
    assert answer.status == 500
    assert "NoneType" not in answer.error["message"]
    assert "NoneType" in caplog.text


async def test_the_client_may_send_its_body_in_chunks(front: Front) -> None:
    async def chunks() -> Any:
        for byte in b'{"model":"tiny","messages":[{"role":"user","content":"x"}]}':
            yield bytes([byte])

    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{front.url}/v1/chat/completions", data=chunks()) as one,
    ):
        assert one.status == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (ask("x" * 4000, "y" * 1200), "messages"),
        ({"model": MODEL, "messages": [{"role": "user", "content": "x" * 5200}]}, "messages"),
        ({"model": MODEL, "prompt": "\u00e9" * 5200}, "prompt"),
    ],
)
async def test_a_text_that_no_instance_can_take_goes_to_none(start: Start, body: Any, param: str) -> None:
    pd = FakeInstance("pd", max_model_len=512, longest_token=10)
    front = await start([pd])
    path = "/v1/completions" if param == "prompt" else "/v1/chat/completions"
    refused = await front.post(body, path)
    assert (refused.status, refused.error["code"], refused.error["param"]) == (400, "context_length_exceeded", param)
    assert refused.error["message"].startswith("This model's maximum context length is 512 tokens")
    assert "at least 520 tokens" in refused.error["message"]
    assert not pd.received
    assert await front.metric('chiasm_http_errors_total{code="context_length_exceeded"}') == 1


async def test_an_instance_that_does_not_say_how_long_texts_may_be_gets_them(start: Start) -> None:
    front = await start([FakeInstance("pd", max_model_len=512)])
    assert (await front.post(ask("x" * 100_000))).status == 200
