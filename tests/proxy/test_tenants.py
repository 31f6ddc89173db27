"""What one tenant has cached, no other finds: tenants are named in the file of keys, or are whoever has one key."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from chiasm.errors import Code
from chiasm.http.config import HttpConfig
from chiasm.media import identifier
from chiasm.proxy.tenants import TenantBy
from chiasm.wire import CHAT_PATH, COMPLETIONS_PATH, OTHER_PATHS, Costs

from .conftest import Front, Images, Start, ask, data_url, image, image_bytes
from .instances import FINGERPRINT, VLLM, FakeInstance, Received, never

A, B = ({"Authorization": f"Bearer {name * 16}"} for name in "ab")


async def begin(start: Start, **config: Any) -> tuple[Front, FakeInstance, FakeInstance]:
    encoder, pd = FakeInstance("encoder"), FakeInstance("pd")
    return await start([encoder, pd], **{"tenant_by": TenantBy.AUTHORIZATION} | config), encoder, pd


async def salts(front: Front, pd: FakeInstance, *requests: tuple[dict[str, str], dict[str, Any]]) -> list[Any]:
    """Send requests with these headers and fields; return the salt of each as the PD gets it."""
    for headers, fields in requests:
        body = {"model": "tiny", "prompt": "x"} if "prompt" in fields else ask("x")
        path = "/v1/completions" if "prompt" in fields else "/v1/chat/completions"
        assert (await front.post(body | fields, path, **headers)).status == 200
    return [received.json.get("cache_salt") for received in pd.received]


@pytest.mark.parametrize("fields", [{}, {"cache_salt": "s"}, {"prompt": "x"}, {"prompt": "x", "cache_salt": "s"}])
async def test_a_key_has_a_salt_of_its_own(start: Start, fields: dict[str, Any]) -> None:
    front, _, pd = await begin(start)
    of_a, again, of_b, of_nobody = await salts(front, pd, (A, fields), (A, fields), (B, fields), ({}, fields))
    assert of_a == again
    assert len({of_a, of_b, of_nobody}) == 3
    assert "a" * 16 not in of_a


async def test_a_client_keeps_its_own_salts_apart_and_cannot_take_that_of_another(start: Start) -> None:
    front, _, pd = await begin(start)
    of_a, salted = await salts(front, pd, (A, {}), (A, {"cache_salt": "s"}))
    assert of_a != salted
    *_, guessed = await salts(front, pd, (B, {"cache_salt": of_a}))
    assert guessed not in (of_a, salted)


async def test_the_same_image_of_two_keys_has_two_embeddings(start: Start) -> None:
    front, encoder, _ = await begin(start)
    for headers in (A, A, B):
        assert (await front.post(ask(image(image_bytes())), **headers)).status == 200
    first, second, other = [received.identifiers for received in encoder.received]
    assert first == second != other


async def test_otherwise_only_the_salt_of_the_request_counts(start: Start) -> None:
    front, _, pd = await begin(start, tenant_by=TenantBy.SALT)
    assert await salts(front, pd, (A, {}), (B, {"cache_salt": "s"})) == [None, "s"]


async def test_keys_of_one_tenant_share_what_no_other_finds(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    tenants = {"a": "t", "b": "t", "c": "u"}
    entries = [f"{{key: {key * 16}, tenant: {tenant}}}" for key, tenant in tenants.items()]
    entries[0] = entries[0].replace("}", ", name: team}")
    file.write_text(f"keys: [{', '.join(entries)}, {{key: {'d' * 16}}}]")
    front, encoder, pd = await begin(start, tenant_by=TenantBy.SALT, http=HttpConfig(api_key_file=file))
    of_a, of_b, of_c, of_d = [{"Authorization": f"Bearer {name * 16}"} for name in "abcd"]
    first, second, third, fourth = await salts(front, pd, (of_a, {}), (of_b, {}), (of_c, {}), (of_d, {}))
    assert first == second
    assert len({first, third, None}) == 3
    assert fourth is None
    *_, guessed = await salts(front, pd, (of_c, {"cache_salt": first}))
    assert guessed not in (first, third)
    for headers in (of_a, of_b, of_c):
        assert (await front.post(ask(image(image_bytes())), **headers)).status == 200
    assert await front.metric('chiasm_proxy_key_requests_total{key="team",status="200"}') == 2
    mine, ours, other = [received.identifiers for received in encoder.received]
    assert mine == ours != other


NOISE = Image.effect_noise((128, 128), 100.0).convert("RGB")
"""Its file is so large that its URL is lifted out of the body."""


def large_image() -> bytes:
    file = io.BytesIO()
    NOISE.save(file, "PNG")
    return file.getvalue()


def assert_is_kept_apart(received: Received, *images: bytes) -> str:
    """Check that the KV and each image of a request have the salt in their names; return it."""
    salt = received.json["cache_salt"]
    assert salt
    assert received.identifiers == [identifier(one, fingerprint=FINGERPRINT, salt=salt) for one in images]
    assert len(received.identifiers) == sum(part["type"] == "image_url" for part in received.parts)
    return str(salt)


@pytest.fixture
def of_tenants(tmp_path: Path) -> dict[str, Any]:
    """Settings with a tenant for each of A and B."""
    file = tmp_path / "keys"
    file.write_text(f"keys: [{{key: {'a' * 16}, tenant: one}}, {{key: {'b' * 16}, tenant: two}}]")
    return {"tenant_by": TenantBy.SALT, "http": HttpConfig(api_key_file=file)}


@pytest.mark.parametrize("engine", [{}, {"engine": VLLM["engine"]}], ids=["built-in", "vllm"])
@pytest.mark.parametrize("by", ["tenant", "authorization", "salt"])
async def test_an_instance_that_encodes_itself_gets_each_image_of_a_salted_request_with_its_name(
    start: Start, images: Images, of_tenants: dict[str, Any], by: str, engine: dict[str, Any]
) -> None:
    aggregated = FakeInstance("aggregated", **engine)
    config = {"tenant": of_tenants, "authorization": {"tenant_by": TenantBy.AUTHORIZATION}, "salt": {}}[by]
    front = await start([aggregated], **config)
    small, large = image_bytes(), large_image()
    head, _, text = data_url(small).partition(",")
    parts = [
        image(small),
        image(large),
        image(f"{head},{text.rstrip('=')}"),
        image(await images(image_bytes("blue"))),
        image(small, uuid="a" * 64),
        {"type": "image_url", "image_url": data_url(small)},
    ]
    seen = []
    for headers, salt in ((A, "s" * 64), (A, "s" * 64), (B, "t" * 64)):
        body = ask("x", *parts) | ({"cache_salt": salt} if by == "salt" else {})
        assert (await front.post(body, **headers)).status == 200
        seen.append(
            assert_is_kept_apart(aggregated.received[-1], small, large, small, image_bytes("blue"), small, small)
        )
    assert seen[0] == seen[1] != seen[2]
    # One image alone, the first of a body, in a stream and not.
    for stream in (False, True):
        assert (await front.post(ask(image(small), stream=stream, cache_salt="u" * 64), **A)).status == 200
        assert_is_kept_apart(aggregated.received[-1], small)


async def test_so_does_one_that_takes_over_when_the_last_encoder_is_gone(
    start: Start, of_tenants: dict[str, Any]
) -> None:
    slow = Costs(prefill_seconds_per_token=1.0)
    encoder, pd, aggregated = (
        FakeInstance("encoder"),
        FakeInstance("pd"),
        FakeInstance("aggregated", engine=VLLM["engine"], costs=slow),
    )
    encoder.answer = pd.answer = never
    front = await start([encoder, pd, aggregated], **of_tenants)
    request = asyncio.ensure_future(front.post(ask("x", image(image_bytes())), **A))
    await asyncio.wait_for(encoder.arrived.acquire(), 60)
    await encoder.kill()
    assert (await request).status == 200
    assert_is_kept_apart(aggregated.received[-1], image_bytes())


@pytest.mark.parametrize("path", [CHAT_PATH, COMPLETIONS_PATH, *OTHER_PATHS])
async def test_every_path_has_the_salt_of_the_tenant_or_is_refused(
    start: Start, of_tenants: dict[str, Any], path: str
) -> None:
    pd = FakeInstance("pd", engine=VLLM["engine"])
    front = await start([pd], **of_tenants)
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "prompt": "x",
        "input": "x",
        "texts": ["x"],
        "cache_salt": "s",
    }
    answers = [await front.post(body, path, **headers) for headers in (A, A, B)]
    if path == "/v2/embed":  # vLLM takes no salt there
        assert [one.error["code"] for one in answers] == [Code.NOT_KEPT_APART] * 3
        assert pd.received == []
        return
    assert [one.status for one in answers] == [200] * 3
    first, again, other = [received.json["cache_salt"] for received in pd.received]
    assert first == again != other
    assert "s" not in (first, other)


@pytest.mark.parametrize("path", OTHER_PATHS)
@pytest.mark.parametrize("by", ["tenant", "salt"])
async def test_an_image_of_a_salted_request_is_refused_where_it_cannot_be_named(
    start: Start, of_tenants: dict[str, Any], by: str, path: str
) -> None:
    aggregated = FakeInstance("aggregated", engine=VLLM["engine"])
    front = await start([aggregated], **(of_tenants if by == "tenant" else {}))
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(image_bytes()).decode()}
    for part in (
        image(image_bytes()),
        {"type": "input_image", "image_url": data_url(image_bytes())},
        {"type": "image", "source": source},
    ):
        body = ask(part) | ({"cache_salt": "s"} if by == "salt" else {})
        answer = await front.post(body, path, **A)
        assert (answer.status, answer.error["code"]) == (400, Code.NOT_KEPT_APART)
    assert aggregated.received == []


@pytest.mark.parametrize(
    "named",
    [{"previous_response_id": "resp_1"}, {"conversation": {"id": "c"}}, {"background": True}, {"request_id": "r"}],
)
async def test_a_tenant_names_nothing_that_an_instance_keeps(
    start: Start, of_tenants: dict[str, Any], named: dict[str, Any]
) -> None:
    pd = FakeInstance("pd", engine=VLLM["engine"])
    front = await start([pd], **of_tenants)
    body = {"input": "x"} | named
    answer = await front.post(body, "/v1/responses", **A)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (400, Code.NOT_KEPT_APART, *named)
    assert pd.received == []
    escaped = json.dumps(body).replace("_", "\\u005f").replace("o", "\\u006f").encode()
    assert (await front.post(escaped, "/v1/responses", **A)).status == 400
    assert pd.received == []


async def test_nothing_of_a_tenant_is_kept_for_later_requests(start: Start, of_tenants: dict[str, Any]) -> None:
    pd = FakeInstance("pd", engine=VLLM["engine"])
    front = await start([pd], **of_tenants)
    body = {"input": "x", "store": True, "previous_response_id": None, "background": False}
    assert (await front.post(body, "/v1/responses", **A)).status == 200
    assert pd.received[0].json["store"] is False
    pd = FakeInstance("pd", engine=VLLM["engine"])
    front = await start([pd])
    assert (await front.post(body | {"previous_response_id": "resp_1"}, "/v1/responses")).status == 200
    assert pd.received[0].json["store"] is True
