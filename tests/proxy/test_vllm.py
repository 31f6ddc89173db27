"""Instances that are vLLM: with chiasm's middleware, or with an empty /health and placeholders that only the encoder's
metadata sizes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from aiohttp import web

from chiasm.http import watch
from chiasm.http.config import HttpConfig
from chiasm.media import identifier

from .conftest import Start, ask, image, image_bytes
from .instances import MODEL, Answering, FakeInstance, Received, chat, encode, once, refuse, vllm_error_event

ENGINE = {"engine": "vllm 0.32.0"}


def vllm(role: str) -> FakeInstance:
    instance = FakeInstance(role)
    instance.health = None
    return instance


async def test_the_model_comes_from_v1_models(start: Start) -> None:
    pd = vllm("pd")
    front = await start([pd])
    assert (await front.get("/health")).json["models"] == [MODEL]
    assert (await front.get("/v1/models")).json["data"][0]["max_model_len"] == 2048
    assert (await front.post(ask("x"))).status == 200


async def test_it_is_asked_with_a_key_that_the_file_has_now(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "INTERVAL_SECONDS", 0.001)
    file, new = tmp_path / "keys", tmp_path / "new"
    file.write_text("first" * 4)
    new.write_text("second" * 4)
    pd = vllm("pd")
    pd.key = "first" * 4
    front = await start([pd], http=HttpConfig(api_key_file=file))
    await front.until(pd, "healthy")
    pd.key = "second" * 4
    await front.until(pd, "unhealthy")
    new.rename(file)
    await front.until(pd, "healthy")


async def test_pd_is_called_with_the_encoders_metadata(start: Start) -> None:
    encoder, pd = vllm("encoder"), vllm("pd")
    early: list[bool] = []

    async def note(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        early.append(bool(pd.received))
        return await encode(instance, request, received)

    encoder.answer = note
    front = await start([encoder, pd])
    assert (await front.post(ask("x", image(image_bytes())))).status == 200
    assert early == [False]
    name = pd.received[0].identifiers[0]
    embeds = {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 4, 6]}, "uuid": name}
    assert pd.received[0].json == ask("x", embeds)


async def test_prefill_and_decode_without_the_middleware_are_not_used(start: Start) -> None:
    p, d, other = FakeInstance("prefill"), FakeInstance("decode"), vllm("decode")
    front = await start([p, d, other])
    shown = {one["url"]: one for one in (await front.get("/health")).json["instances"]}[other.url]
    assert shown["state"] == "mismatched"
    assert "chiasm's middleware" in shown["reason"]
    for _ in range(2):
        assert (await front.post(ask("x"))).status == 200
    assert not other.received


async def test_a_pd_with_the_middleware_is_called_while_encoders_work(start: Start) -> None:
    encoder, pd = FakeInstance("encoder", **ENGINE), FakeInstance("pd", **ENGINE)
    encoder.answer = after(pd.arrived)
    front = await start([encoder, pd])
    assert (await front.post(ask("x", image(image_bytes(size=(6, 4)))))).status == 200
    assert pd.received[0].parts[1]["image_embeds"] == {"image_size": [4, 6]}
    shown = (await front.get("/health")).json["instances"]
    assert [one["engine"] for one in shown] == ["vllm 0.32.0"] * 2


async def test_pd_that_cannot_size_an_image_waits_for_the_encoders_metadata(start: Start) -> None:
    encoder, pd = FakeInstance("encoder", **ENGINE), FakeInstance("pd", takes_image_size=False, **ENGINE)
    front = await start([encoder, pd])
    assert (await front.post(ask("x", image(image_bytes()), image(image_bytes("blue"))))).status == 200
    assert [part["image_embeds"] for part in pd.received[0].parts[1:]] == [{"image_grid_thw": [1, 4, 6]}] * 2
    assert pd.received[0].identifiers == encoder.received[0].identifiers


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"dtype": "bfloat16"}, "its dtype is bfloat16, but the fleet's is float32"),
        ({"dtype": "float32"}, "its fingerprint (model or processor) differs from the fleet's"),
        ({}, "its fingerprint (model, processor or dtype) differs from the fleet's"),
    ],
)
async def test_an_instance_with_another_fingerprint_is_not_used(
    start: Start, said: dict[str, str], reason: str
) -> None:
    pd = FakeInstance("pd", dtype="float32", **ENGINE)
    encoder = FakeInstance("encoder", dtype="float32")
    other = FakeInstance("encoder", fingerprint="e" * 64, **said, **ENGINE)
    front = await start([pd, encoder, other])
    shown = {one["url"]: one for one in (await front.get("/health")).json["instances"]}[other.url]
    assert (shown["state"], shown["reason"]) == ("mismatched", reason)
    for colour in ("red", "green", "blue"):
        assert (await front.post(ask(image(image_bytes(colour))))).status == 200
    assert not other.received


async def test_a_limit_of_zero_images_is_ignored(start: Start) -> None:
    """vLLM reports it if it has loaded no vision tower."""
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd", max_items=0, **ENGINE)
    front = await start([encoder, pd])
    assert (await front.post(ask(image(image_bytes()), image(image_bytes("blue"))))).status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_of_the_engine_has_a_status(start: Start, stream: bool) -> None:
    pd = FakeInstance("pd", **ENGINE)
    pd.answer = vllm_error_event
    front = await start([pd])
    answer = await front.post(ask("x", stream=stream))
    assert (answer.status, answer.error["type"]) == (500, "InternalServerError")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_at_which_the_engine_has_died_goes_to_another_instance(start: Start, stream: bool) -> None:
    async def die(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        instance.health_status = 503
        return await vllm_error_event(instance, request, received)

    pds = [FakeInstance("pd", **ENGINE), FakeInstance("pd", **ENGINE)]
    once(die, chat, *pds)
    front = await start([*pds])
    assert (await front.post(ask("x", stream=stream))).status == 200
    assert [len(pd.received) for pd in pds] == [1, 1]


BUSY = refuse(503, "The engine is currently busy and cannot accept new requests.", kind="Service Unavailable", code=503)
"""What vLLM answers at its limit of requests."""


async def test_a_full_pd_gives_its_request_to_another(start: Start) -> None:
    pds = [FakeInstance("pd", **ENGINE), FakeInstance("pd", **ENGINE)]
    pds[0].answer = BUSY
    front = await start([*pds])
    for _ in range(3):
        assert (await front.post(ask("x"))).status == 200
    assert len(pds[1].received) == 3


async def test_images_wait_for_a_full_encoder(start: Start) -> None:
    encoder, pd = FakeInstance("encoder", **ENGINE), FakeInstance("pd", **ENGINE)
    once(BUSY, encode, encoder)
    front = await start([encoder, pd])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert await front.metric("chiasm_proxy_encode_refusals_total") == 1


def after(arrived: asyncio.Semaphore) -> Answering:
    """Answer as an encoder, once another instance has been called."""

    async def answer(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await arrived.acquire()
        return await encode(instance, request, received)

    return answer


async def test_identifiers_without_a_fingerprint_use_the_models_name(start: Start) -> None:
    encoder, pd = vllm("encoder"), vllm("pd")
    front = await start([encoder, pd])
    await front.post(ask(image(image_bytes())))
    assert pd.received[0].identifiers == [identifier(image_bytes(), fingerprint=front.service.fleet.fingerprint)]


async def test_chiasms_encoder_works_with_vllms_pd(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), vllm("pd")
    front = await start([encoder, pd])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert "image_grid_thw" in pd.received[0].parts[0]["image_embeds"]


async def test_a_refusal_of_vllms_encoder_reaches_the_client(start: Start) -> None:
    encoder, pd = vllm("encoder"), vllm("pd")
    encoder.answer = refuse(422, "not decodable")
    front = await start([encoder, pd])
    answer = await front.post(ask(image(image_bytes())))
    assert answer.status == 422
    assert answer.error["message"] == "not decodable"
    assert not pd.received


async def test_metadata_passes_unchanged(start: Start) -> None:
    metadata = b'{"image_grid_thw": [[1, 2,  3]], "x": 1.50}'

    async def spaced(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        name = json.dumps(received.identifiers[0]).encode()
        return web.Response(
            body=b'{"ec_transfer_params": {%b: {"item_indices": [0], "metadata": %b}}}' % (name, metadata)
        )

    encoder, pd = vllm("encoder"), vllm("pd")
    encoder.answer = spaced
    front = await start([encoder, pd])
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert b'"image_embeds":' + metadata + b',"uuid"' in pd.received[0].body
