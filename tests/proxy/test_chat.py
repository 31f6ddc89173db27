"""How a request flows if nothing fails."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from aiohttp import web

from chiasm.http.config import HttpConfig
from chiasm.media import MediaConfig, identifier

from .conftest import LOOPBACK, Images, Start, ask, data_url, image, image_bytes
from .instances import FINGERPRINT, MODEL, FakeInstance, Received, chat, encode


async def test_text_passes_unchanged_and_calls_no_encoder(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd])
    body = b'{ "model":"tiny" ,\n "messages":[{"role":"user","content":"h\\u00e9llo \xc3\xa9"}],"x":1.50,"x":[1e2]}'
    answer = await front.post(body)
    assert answer.status == 200
    assert [received.body for received in pd.received] == [body]
    assert not encoder.received


async def test_text_parts_pass_unchanged(start: Start) -> None:
    pd = FakeInstance("pd")
    front = await start([pd])
    body = b'{"model":"tiny","messages":[{"role":"user","content":[ {"type":"text","text":"a"},{"type":"refusal"} ]}]}'
    assert (await front.post(body)).status == 200
    assert pd.received[0].body == body


async def test_completions_pass_unchanged(start: Start) -> None:
    pd = FakeInstance("pd")
    front = await start([pd])
    body = b'{"prompt": [1, 2,3 ], "model": "tiny"}'
    assert (await front.post(body, "/v1/completions")).status == 200
    assert pd.received[0].path == "/v1/completions"
    assert pd.received[0].body == body


async def test_pixels_go_to_the_encoder_and_their_size_to_pd(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd])
    data = image_bytes(size=(30, 20))
    answer = await front.post(ask("what is it?", image(data), temperature=0.50))
    assert answer.status == 200, answer.body
    assert answer.json["choices"][0]["message"]["content"] == "a cat"

    name = identifier(data, fingerprint=FINGERPRINT)
    part = {"type": "image_url", "image_url": {"url": data_url(data)}, "uuid": name}
    assert encoder.received[0].json == {
        "model": MODEL,
        "messages": [{"role": "user", "content": [part]}],
        "max_tokens": 1,
        "stream": False,
    }
    embeds = {"type": "image_embeds", "image_embeds": {"image_size": [20, 30]}, "uuid": name}
    assert pd.received[0].json == ask("what is it?", embeds, temperature=0.50)


async def test_everything_but_images_keeps_its_bytes(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd])
    url = data_url(image_bytes()).encode()
    name = identifier(image_bytes(), fingerprint=FINGERPRINT).encode()
    part = b'{"image_url":{"url":"%b","detail":"low"},"type":"image_url"}'
    body = (
        b'{"seed":1e0,"model":"tiny","messages":[{"role":"system","content":"\\u00e9 \xc3\xa9"},'
        b'{"content":[{"text":"\\ud83d\\ude00 ","type":"text"},' + part + b',{"type":"text","text":"%b"}],'
        b'"role":"user","name":"n"}],"temperature":0.10}'
    )
    answer = await front.post(body % (url, url))
    assert answer.status == 200, answer.body
    embeds = b'{"type":"image_embeds","image_embeds":{"image_size":[4,6]},"uuid":"%b"}' % name
    assert pd.received[0].body == body.replace(part, embeds) % url


@pytest.mark.parametrize("escaped", [False, True])
async def test_long_urls_are_replaced_and_long_texts_stay(start: Start, escaped: bool) -> None:
    """A text that equals the image's URL isn't mistaken for it."""
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd])
    long = b"".join(image_bytes() for _ in range(100))
    url = data_url(long).encode()
    sent = url.replace(b"/", b"\\/") if escaped else url
    head = b'{"model":"tiny","messages":[{"role":"user","content":['
    text = b'{"type":"text","text":"%b"}' % url
    part = b'{"type":"image_url","image_url":{"url":"%b"}}' % sent
    name = identifier(long, fingerprint=FINGERPRINT).encode()
    embeds = b'{"type":"image_embeds","image_embeds":{"image_size":[4,6]},"uuid":"%b"}' % name
    for parts in ([text, part], [part, text], [part, part], [text, part, text, part], [part]):
        pd.received.clear()
        assert (await front.post(head + b",".join(parts) + b"]}]}")).status == 200
        wanted = head + b",".join(embeds if one is part else one for one in parts) + b"]}]}"
        assert pd.received[0].body == wanted


@pytest.mark.parametrize(("character", "escape"), [("/", "\\/"), ("+", "\\u002B"), ("=", "\\u003d")])
async def test_an_image_with_escapes_in_its_base64_does_not_count_as_text(
    start: Start, character: str, escape: str
) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd], http=HttpConfig(max_text_bytes=10_000))
    data = image_bytes("#fbefbe", size=(81, 80), format="BMP")
    body = json.dumps(ask("x", image(data))).replace(character, escape)
    assert escape in body
    assert (await front.post(body.encode())).status == 200
    assert encoder.received[0].identifiers == [identifier(data, fingerprint=FINGERPRINT)]


async def test_images_of_all_messages_keep_their_order(start: Start) -> None:
    encoders, pd = [FakeInstance("encoder"), FakeInstance("encoder")], FakeInstance("pd")
    front = await start([*encoders, pd])
    colours = ["red", "green", "blue", "red"]
    names = [identifier(image_bytes(colour), fingerprint=FINGERPRINT) for colour in colours]
    messages = [
        {"role": "user", "content": [image(image_bytes("red")), image(image_bytes("green"))]},
        {"role": "assistant", "content": "yes"},
        {"role": "tool", "tool_call_id": "x", "content": [{"type": "text", "text": "t"}, image(image_bytes("blue"))]},
        {"role": "user", "content": [image(image_bytes("red"))]},
    ]
    assert (await front.post({"model": MODEL, "messages": messages})).status == 200
    assert pd.received[0].identifiers == names
    sent = [name for encoder in encoders for received in encoder.received for name in received.identifiers]
    assert sorted(sent) == sorted(set(names))


async def test_images_are_spread_over_encoders_in_one_call_each(start: Start) -> None:
    encoders, pd = [FakeInstance("encoder"), FakeInstance("encoder")], FakeInstance("pd")
    front = await start([*encoders, pd])
    large, small = image_bytes(size=(90, 10)), [image_bytes(size=(30, 10 + n)) for n in range(3)]
    assert (await front.post(ask(image(small[0]), image(large), image(small[1]), image(small[2])))).status == 200
    assert [len(encoder.received) for encoder in encoders] == [1, 1]
    assert sorted(len(encoder.received[0].identifiers) for encoder in encoders) == [1, 3]


async def test_no_call_has_more_images_than_an_encoder_accepts(start: Start) -> None:
    encoder, pd = FakeInstance("encoder", max_items=2), FakeInstance("pd")
    front = await start([encoder, pd])
    assert (await front.post(ask(*(image(image_bytes(size=(5, n))) for n in range(1, 6))))).status == 200
    assert sorted(len(received.identifiers) for received in encoder.received) == [1, 2, 2]


async def test_pd_is_called_before_the_encoder_has_answered(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")

    async def after_pd(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await pd.arrived.acquire()
        return await encode(instance, request, received)

    encoder.answer = after_pd
    front = await start([encoder, pd])
    assert (await front.post(ask(image(image_bytes())))).status == 200


async def test_fetched_media_goes_to_the_encoder_and_each_url_is_fetched_once(start: Start, images: Images) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd])
    url = await images(image_bytes("blue", (5, 5), "JPEG"))
    answer = await front.post(ask(image(url), image(url)))
    assert answer.status == 200, answer.body
    assert images.fetched == 1
    sent = encoder.received[0].parts
    assert [part["image_url"]["url"] for part in sent] == [data_url(image_bytes("blue", (5, 5), "JPEG"), "image/jpeg")]
    assert pd.received[0].identifiers == [sent[0]["uuid"]] * 2
    assert url not in pd.received[0].body.decode()
    assert "fetch;dur=" in answer.headers["Server-Timing"]


async def test_a_url_never_names_content(start: Start, images: Images) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd])
    url = await images(image_bytes("blue"))
    await front.post(ask(image(url)))
    images.content = image_bytes("red")
    await front.post(ask(image(url)))
    assert len({received.identifiers[0] for received in pd.received}) == 2


async def test_files_in_the_allowed_folder_are_read(start: Start, tmp_path: Path) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd], media=MediaConfig(allowed_local_media_path=tmp_path))
    (tmp_path / "a.png").write_bytes(image_bytes())
    assert (await front.post(ask(image(f"file://{tmp_path}/a.png")))).status == 200
    assert encoder.received[0].parts[0]["image_url"]["url"] == data_url(image_bytes())


async def test_a_url_may_be_a_plain_string(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd])
    part = {"type": "image_url", "image_url": data_url(image_bytes())}
    assert (await front.post(ask(part))).status == 200
    assert encoder.received[0].parts[0]["image_url"] == {"url": data_url(image_bytes())}


async def test_base64_is_passed_on_in_its_plain_form(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd])
    head, _, text = data_url(image_bytes()).partition(",")
    in_lines = "".join(f"{text[at : at + 76]}\r\n" for at in range(0, len(text), 76))
    unpadded = text.rstrip("=").replace("+", "-").replace("/", "_")
    for url in (f"{head},{in_lines}", f" {head.upper()},{unpadded}", f"data:;charset=utf-8;base64,{text}"):
        assert (await front.post(ask(image(url)))).status == 200
        assert encoder.received[-1].parts[0]["image_url"]["url"] == data_url(image_bytes())
        assert encoder.received[-1].parts[0]["uuid"] == identifier(image_bytes(), fingerprint=FINGERPRINT)


async def test_the_media_type_comes_from_the_files_bytes(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd])
    assert (await front.post(ask(image(data_url(image_bytes(), "image/x-icon"))))).status == 200
    assert encoder.received[0].parts[0]["image_url"]["url"] == data_url(image_bytes())


async def test_tenants_with_a_salt_share_no_identifiers(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd])
    for salt in (None, "a", "b", "a"):
        assert (await front.post(ask(image(image_bytes()), cache_salt=salt))).status == 200
    names = [received.identifiers[0] for received in pd.received]
    assert len(set(names)) == 3
    assert names[1] == names[3] == identifier(image_bytes(), fingerprint=FINGERPRINT, salt="a")


async def test_a_clients_uuid_never_names_content(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd])
    for colour in ("red", "blue"):
        assert (await front.post(ask(image(image_bytes(colour), uuid="a" * 64)))).status == 200
    names = [received.identifiers[0] for received in pd.received]
    assert names == [identifier(image_bytes(colour), fingerprint=FINGERPRINT) for colour in ("red", "blue")]


async def test_text_goes_to_the_pd_with_the_least_work(start: Start) -> None:
    pds = [FakeInstance("pd"), FakeInstance("pd"), FakeInstance("pd")]
    going = asyncio.Event()

    async def wait(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        await going.wait()
        return await chat(instance, request, received)

    for pd in pds:
        pd.answer = wait
    front = await start([*pds])
    requests = [asyncio.ensure_future(front.post(ask("x" * 9000)))]
    for _ in range(6):
        requests.append(asyncio.ensure_future(front.post(ask("x"))))
    for _ in range(7):
        arrivals = [asyncio.ensure_future(pd.arrived.acquire()) for pd in pds]
        await asyncio.wait(arrivals, return_when=asyncio.FIRST_COMPLETED)
        for arrival in arrivals:
            arrival.cancel()
        if sum(len(pd.received) for pd in pds) == 7:
            break
    going.set()
    assert {answer.status for answer in await asyncio.gather(*requests)} == {200}
    assert max(len(pd.received) for pd in pds) <= 3
    assert all(instance.outstanding == 0 and not instance.in_flight for instance in front.service.fleet.instances)


async def test_equal_pds_take_turns(start: Start) -> None:
    pds = [FakeInstance("pd"), FakeInstance("pd")]
    front = await start([*pds])
    for _ in range(6):
        await front.post(ask("x"))
    assert [len(pd.received) for pd in pds] == [3, 3]


async def test_instances_get_the_deadline_and_the_request_id(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd], deadline_seconds=20, encode_timeout_seconds=30)
    answer = await front.post(
        ask(image(image_bytes())),
        **{"X-Request-Id": "id-1", "Authorization": "Bearer k", "X-Other": "x", "Cookie": "a=b"},
    )
    assert answer.headers["X-Request-Id"] == "id-1"
    assert pd.received[0].headers["X-Request-Id"] == "id-1"
    assert encoder.received[0].headers["X-Request-Id"] == "id-1-e1"
    assert 0 < int(pd.received[0].headers["X-Request-Deadline-Ms"]) <= 20_000
    assert encoder.received[0].headers["X-Request-Deadline-Ms"] == "30000"  # others may join, whose deadlines are later
    for received in (encoder.received[0], pd.received[0]):
        assert received.headers["Authorization"] == "Bearer k"
        assert "X-Other" not in received.headers
        assert "Cookie" not in received.headers


async def test_a_client_may_ask_for_an_earlier_deadline(start: Start) -> None:
    pd = FakeInstance("pd")
    front = await start([pd])
    await front.post(ask("x"), **{"X-Request-Deadline-Ms": "5000"})
    await front.post(ask("x"), **{"X-Request-Deadline-Ms": "900000"})
    given = [int(received.headers["X-Request-Deadline-Ms"]) for received in pd.received]
    assert given[0] <= 5000 < given[1] <= 60_000


@pytest.mark.parametrize(("deadline", "status"), [("soon", 400), ("1.5", 400), ("0", 504), ("-1", 504)])
async def test_a_deadline_that_is_malformed_or_has_passed_is_refused(start: Start, deadline: str, status: int) -> None:
    pd = FakeInstance("pd")
    front = await start([pd])
    assert (await front.post(ask("x"), **{"X-Request-Deadline-Ms": deadline})).status == status
    assert not pd.received


async def test_every_answer_has_a_server_timing(start: Start) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    front = await start([encoder, pd])

    async def after_encoder(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
        while received.parts and not await front.metric('chiasm_proxy_items_total{outcome="encoded"}'):
            pass
        return await chat(instance, request, received)

    pd.answer = after_encoder
    media = (await front.post(ask(image(image_bytes())))).headers["Server-Timing"]
    names = [entry.partition(";")[0] for entry in media.split(", ")]
    assert names == ["encode", "encode_call", "proxy", "estimate", "placement", "queue", "item0"]
    assert "encode;dur=12.50" in media
    assert 'item0;desc="hit"' in media
    text = (await front.post({"model": MODEL, "messages": [{"role": "user", "content": "x"}]})).headers["Server-Timing"]
    assert [entry.partition(";")[0] for entry in text.split(", ")] == [
        "proxy",
        "estimate",
        "placement",
        "queue",
        "item0",
    ]
    assert 'placement;desc="pd 1"' in text
    assert "Server-Timing" in (await front.post(b"{")).headers


async def test_the_operator_can_limit_the_domains_of_images(start: Start, images: Images) -> None:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    url = await images(image_bytes())
    front = await start(
        [encoder, pd], media=MediaConfig(allowed_media_networks=LOOPBACK, allowed_media_domains=("x.y",))
    )
    assert (await front.post(ask(image(url)))).error["code"] == "media_domain_not_allowed"
    assert not images.fetched
