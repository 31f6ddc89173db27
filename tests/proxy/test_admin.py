"""Instances added and removed while the proxy runs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from chiasm.errors import ConfigurationError
from chiasm.http import watch
from chiasm.proxy import ProxyConfig
from chiasm.proxy.app import create_app

from .conftest import Answer, Front, Start, ask, image, image_bytes, listen
from .instances import SAID, FakeInstance, after, chat, decode

KEY = "s3cret" * 3


async def call(front: Front, method: str, body: Any = None, key: str | None = KEY) -> Answer:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with front.session.request(method, f"{front.url}/instances", json=body, headers=headers) as response:
        return Answer(response.status, response.headers, await response.read())


async def test_the_route_does_not_exist_without_a_key(start: Start) -> None:
    front = await start([FakeInstance("pd")])
    assert (await call(front, "GET")).status == 404


@pytest.mark.parametrize("key", [None, "", "wrong", KEY + "x"])
async def test_requests_without_the_right_key_are_refused(start: Start, key: str | None) -> None:
    front = await start([FakeInstance("pd")], admin_key=KEY)
    for method in ("GET", "POST", "DELETE"):
        answer = await call(front, method, {"url": front.instances[0].url, "role": "pd"}, key)
        assert answer.status == 401
        assert answer.error["message"]
    assert len(await front.states()) == 1


async def test_an_encoder_is_added_and_removed(start: Start) -> None:
    pd, encoder = FakeInstance("pd"), FakeInstance("encoder")
    front = await start([pd], admin_key=KEY)
    assert (await front.post(ask(image(image_bytes())))).error["code"] == "no_encoder"
    await encoder.start()
    added = await call(front, "POST", {"url": encoder.url + "/", "role": "encoder"})
    assert added.status == 201
    assert added.json["state"] == "healthy"
    assert (await front.post(ask(image(image_bytes())))).status == 200
    assert len((await call(front, "GET")).json["instances"]) == 2
    removed = await call(front, "DELETE", {"url": encoder.url})
    assert removed.status == 202
    assert removed.json["state"] == "draining"
    assert (await front.states()) == {pd.url: "healthy"}
    assert (await front.post(ask(image(image_bytes())))).error["code"] == "no_encoder"
    await encoder.kill()


async def test_a_removed_instance_finishes_its_calls(start: Start) -> None:
    pds, gate = [FakeInstance("pd"), FakeInstance("pd")], asyncio.Event()

    pds[0].answer = after(gate, chat)
    front = await start([*pds], admin_key=KEY)
    requests = [asyncio.ensure_future(front.post(ask("x"))) for _ in range(2)]
    await pds[0].arrived.acquire()
    assert (await call(front, "DELETE", {"url": pds[0].url})).status == 202
    assert (await front.states())[pds[0].url] == "draining"
    assert (await front.post(ask("x"))).status == 200
    assert len(pds[0].received) == 1
    gate.set()
    assert {answer.status for answer in await asyncio.gather(*requests)} == {200}
    await front.until(pds[0], "removed")


async def test_prefill_and_decode_are_added_and_removed(start: Start) -> None:
    first = [FakeInstance("prefill"), FakeInstance("decode")]
    second = [FakeInstance("prefill"), FakeInstance("decode")]
    front = await start([*first], admin_key=KEY)
    for instance in second:
        await instance.start()
        assert (await call(front, "POST", {"url": instance.url, "role": instance.role})).json["state"] == "healthy"
    for instance in first:
        assert (await call(front, "DELETE", {"url": instance.url})).status == 202
    assert (await front.states()).keys() == {instance.url for instance in second}
    assert (await front.post(ask("x"))).status == 200
    assert [len(instance.received) for instance in (*first, *second)] == [0, 0, 1, 1]
    assert (await call(front, "DELETE", {"url": second[1].url})).status == 202
    assert (await front.post(ask("x"))).error["code"] == "no_decode"
    for instance in second:
        await instance.kill()


async def test_a_removed_decode_instance_finishes_its_streams(start: Start) -> None:
    p, ds, seen = FakeInstance("prefill"), [FakeInstance("decode"), FakeInstance("decode")], asyncio.Event()

    ds[0].answer = after(seen, decode)
    front = await start([p, *ds], admin_key=KEY)
    streams = [asyncio.ensure_future(listen(front, ask("x", stream=True))) for _ in range(2)]
    await ds[0].arrived.acquire()
    assert (await call(front, "DELETE", {"url": ds[0].url})).json["state"] == "draining"
    assert (await listen(front, ask("x", stream=True))).text == SAID
    assert len(ds[0].received) == 1
    seen.set()
    assert [heard.text for heard in await asyncio.gather(*streams)] == [SAID, SAID]
    await front.until(ds[0], "removed")
    assert len(p.received) == 3


@pytest.mark.parametrize(
    ("fleet", "role"),
    [
        (("pd",), "prefill"),
        (("aggregated",), "decode"),
        (("prefill", "decode"), "pd"),
        (("prefill", "decode"), "aggregated"),
    ],
)
async def test_a_role_of_the_other_kind_of_fleet_is_refused(start: Start, fleet: tuple[str, ...], role: str) -> None:
    front = await start([FakeInstance(one) for one in fleet], admin_key=KEY)
    answer = await call(front, "POST", {"url": "http://127.0.0.1:1", "role": role})
    assert answer.status == 409
    assert f"combined with {role} instances" in answer.error["message"]
    assert len(await front.states()) == len(fleet)


async def test_an_empty_fleet_can_be_filled_with_prefill_and_decode(start: Start) -> None:
    p, d = FakeInstance("prefill"), FakeInstance("decode")
    front = await start([], admin_key=KEY)
    codes = []
    for instance in (p, d):
        codes.append((await front.post(ask("x"))).error["code"])
        await instance.start()
        await call(front, "POST", {"url": instance.url, "role": instance.role})
    assert codes == ["no_pd", "no_decode"]
    assert (await front.post(ask("x"))).status == 200
    for instance in (p, d):
        await instance.kill()


async def test_a_proxy_can_start_without_instances(start: Start) -> None:
    pd = FakeInstance("pd")
    front = await start([], admin_key=KEY)
    assert (await front.get("/health")).status == 503
    await pd.start()
    await call(front, "POST", {"url": pd.url, "role": "pd"})
    assert (await front.post(ask("x"))).status == 200
    await pd.kill()


@pytest.mark.parametrize(
    "body",
    [
        None,
        {},
        {"url": "x", "role": "pd"},
        {"url": "http://a:1", "role": "judge"},
        {"url": "http://a:1"},
        {"url": 1, "role": "pd"},
    ],
)
async def test_malformed_orders_are_refused(start: Start, body: Any) -> None:
    front = await start([FakeInstance("pd")], admin_key=KEY)
    answer = await call(front, "POST", body)
    assert answer.status == 400
    assert answer.error["message"]
    assert len(await front.states()) == 1


async def test_adding_a_known_url_and_removing_an_unknown_one_are_refused(start: Start) -> None:
    pd = FakeInstance("pd")
    front = await start([pd], admin_key=KEY)
    assert (await call(front, "POST", {"url": pd.url, "role": "pd"})).status == 409
    assert (await call(front, "POST", {"url": pd.url, "role": "encoder"})).status == 409
    assert (await call(front, "DELETE", {"url": "http://127.0.0.1:1"})).status == 404
    assert (await front.states()) == {pd.url: "healthy"}


async def test_the_keys_may_be_in_a_file(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n{'other' * 4}\n")
    front = await start([FakeInstance("pd")], admin_key_file=file)
    assert [(await call(front, "GET", None, key)).status for key in (KEY, "other" * 4, "wrong")] == [200, 200, 401]


async def test_a_file_of_keys_that_is_replaced_while_the_proxy_runs_is_read_again(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "INTERVAL_SECONDS", 0.001)
    file, new = tmp_path / "keys", tmp_path / "new"
    file.write_text(KEY)
    new.write_text("other" * 4)
    front = await start([FakeInstance("pd")], admin_key_file=file)
    new.rename(file)
    async with asyncio.timeout(60):
        while (await call(front, "GET", None, "other" * 4)).status != 200:
            pass
    assert (await call(front, "GET", None, KEY)).status == 401


@pytest.mark.parametrize("key", ["", "k", "k" * 15])
def test_a_key_that_could_be_guessed_is_refused_at_start(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigurationError, match="--admin-key or CHIASM_ADMIN_KEY: a key must have at least 16"):
        ProxyConfig(admin_key=key)
    file = tmp_path / "keys"
    file.write_text(key)
    with pytest.raises(ConfigurationError, match="--admin-key-file"):
        create_app(ProxyConfig(admin_key_file=file))


async def test_strangers_learn_only_whether_it_is_ready(start: Start) -> None:
    front = await start([FakeInstance("pd")], admin_key=KEY)
    for path in ("/health", "/readyz", "/livez"):
        answer = await front.get(path)
        assert (answer.status, answer.json) == (200, {"status": "ok"})
    assert (await front.get("/metrics")).status == 401
    shown = await front.get("/health", **front.admin)
    assert [one["url"] for one in shown.json["instances"]] == [front.instances[0].url]
    assert (await front.get("/metrics", **front.admin)).status == 200


async def test_it_lives_while_it_is_not_ready(start: Start) -> None:
    front = await start([FakeInstance("encoder")], admin_key=KEY)
    assert [(await front.get(path)).status for path in ("/livez", "/readyz", "/health")] == [200, 503, 503]
