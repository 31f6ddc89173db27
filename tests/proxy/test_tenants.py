"""What one tenant has cached, no other finds: tenants are named in the file of keys, or are whoever has one key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chiasm.http.config import HttpConfig
from chiasm.proxy.tenants import TenantBy

from .conftest import Front, Start, ask, image, image_bytes
from .instances import FakeInstance

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
