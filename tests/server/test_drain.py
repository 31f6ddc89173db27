"""An instance that is taken down: what it still does, and what it waits for."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from chiasm.errors import Code, ConfigurationError, OverloadedError
from chiasm.server import ServerConfig, create_app, joining
from chiasm.server.advertise import check_proxies, own_url
from chiasm.server.context import ServerContext
from chiasm.wire import DRAIN_PATH, LEASE_PATH, Lease, LeaseAnswer, Role
from tests.server.fake_engine import FakeEncoderEngine, FakeLanguageEngine
from tests.server.images import chat
from tests.server.serving import get, post, serving


def test_an_instance_that_is_asked_to_drain_refuses_new_work_and_says_what_is_left() -> None:
    with serving(create_app(FakeLanguageEngine(Role.PREFILL), served_model_name="bytes")) as url:
        before = get(f"{url}/health").json
        state = post(f"{url}{DRAIN_PATH}", {})
        assert state.status == 202
        assert state.json == {"incarnation": before["incarnation"], "requests": 0, "kv": 1, "embeddings": 0}
        health = get(f"{url}/health")
        assert (health.status, health.json["status"]) == (503, "draining")
        refused = post(f"{url}/v1/chat/completions", chat("Hi"))
        assert (refused.status, refused.error["code"]) == (503, "stopping")
        assert post(f"{url}{DRAIN_PATH}", {}).status == 202


def test_only_the_fleet_may_drain_an_instance(tmp_path: Path) -> None:
    file = tmp_path / "fleet.key"
    file.touch(0o600)
    file.write_text("k" * 32)
    config = ServerConfig(fleet_key_file=file)
    with serving(create_app(FakeEncoderEngine(), served_model_name="bytes", config=config)) as url:
        refused = post(f"{url}{DRAIN_PATH}", {})
        assert (refused.status, refused.error["code"]) == (403, "fleet_key_needed")
        assert get(f"{url}/health").json["status"] == "ok"


def test_a_draining_pd_still_says_which_embeddings_it_awaits() -> None:
    with serving(create_app(FakeLanguageEngine(Role.PD), served_model_name="bytes")) as url:
        post(f"{url}{DRAIN_PATH}", {})
        assert get(f"{url}/embeddings/awaited").status == 200
        assert post(f"{url}/embeddings/places", {"places": {}}).status == 204


class Owing(FakeEncoderEngine):
    """An encoder whose embeddings somebody has yet to fetch."""

    unfetched = 2

    def unfetched_embeddings(self) -> int:
        return self.unfetched


async def test_an_encoder_ends_when_its_embeddings_have_been_fetched() -> None:
    engine = Owing()
    context = ServerContext("bytes", ServerConfig(), engine)
    assert not context.is_idle  # it takes requests
    context.drain()
    assert (context.is_idle, context.left.embeddings) == (False, 2)
    engine.unfetched = 0
    assert context.is_idle


async def test_an_instance_takes_what_comes_until_its_proxies_know_that_it_drains() -> None:
    told = asyncio.Event()

    class Joiner:
        async def tell(self) -> None:
            await told.wait()

    context = ServerContext("bytes", ServerConfig(), FakeEncoderEngine())
    context.joiner = Joiner()  # type: ignore[assignment]
    context.drain()
    assert (context.state, context.lease().status) == ("draining", "draining")
    context.check_ready()
    assert not context.is_idle
    told.set()
    await asyncio.wait_for(asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}), 60)
    assert context.is_idle
    with pytest.raises(OverloadedError) as refused:
        context.check_ready()
    assert refused.value.code == Code.STOPPING


@pytest.mark.parametrize("is_gone", [False, True], ids=["frozen", "gone"])
async def test_an_instance_ends_also_if_its_proxy_can_not_be_told(
    monkeypatch: pytest.MonkeyPatch, is_gone: bool
) -> None:
    monkeypatch.setattr(joining, "_TELL_SECONDS", 0.01)
    calls, end = asyncio.Semaphore(0), asyncio.Event()

    async def answer_once(request: web.Request) -> web.Response:
        calls.release()
        if msgspec.json.decode(await request.read(), type=Lease).waits:  # it holds the lease
            await end.wait()
            raise web.HTTPServiceUnavailable
        return web.Response(body=msgspec.json.encode(LeaseAnswer(state="healthy")))

    application = web.Application()
    application.router.add_post(LEASE_PATH, answer_once)
    proxy = web.AppRunner(application, access_log=None)
    await proxy.setup()
    await web.TCPSite(proxy, "127.0.0.1", 0).start()
    context = ServerContext(
        "bytes", ServerConfig(join=(f"http://127.0.0.1:{proxy.addresses[0][1]}",)), FakeEncoderEngine()
    )
    async with context.opened(), asyncio.timeout(60):
        for _ in range(2):
            await calls.acquire()
        if is_gone:
            end.set()
            await proxy.cleanup()
        context.drain()
        assert context._telling is not None
        await context._telling
        assert context.is_idle
    end.set()
    await proxy.cleanup()


def test_a_lease_says_who_where_and_how_busy_an_instance_is() -> None:
    context = ServerContext("bytes", ServerConfig(), FakeLanguageEngine(Role.PREFILL))
    context.url = "http://10.0.0.5:8001"
    lease = context.lease()
    assert (lease.url, lease.role, lease.status) == ("http://10.0.0.5:8001", "prefill", "ok")
    assert lease.incarnation == context.incarnation
    assert (lease.load.kv_blocks_free, lease.load.requests) == (5, 0)
    assert ServerContext("bytes", ServerConfig()).incarnation != context.incarnation


# ---- where proxies reach it ----------------------------------------------------------------------------------------------


def test_an_instance_on_loopback_can_not_join_a_proxy_of_another_machine() -> None:
    with pytest.raises(ConfigurationError, match="--advertise-url"):
        ServerConfig(join=("http://10.0.0.1:8000",))
    assert ServerConfig(join=("http://localhost:8000",)).join
    assert ServerConfig(join=("http://10.0.0.1:8000",), advertise_url="http://10.0.0.5:8001").join


@pytest.mark.parametrize("url", ["proxy:8000", "ftp://proxy", "http://proxy/v1"])
def test_what_is_no_base_url_is_one_clear_error(url: str) -> None:
    with pytest.raises(ConfigurationError, match="is not the base URL"):
        ServerConfig(host="10.0.0.5", join=(url,))
    with pytest.raises(ConfigurationError, match="is not the base URL"):
        ServerConfig(host="10.0.0.5", join=("http://proxy:8000",), advertise_url=url)


def test_too_many_proxies_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="64 are the limit"):
        check_proxies([f"http://proxy:{port}" for port in range(1, 66)], "10.0.0.5", "")


@pytest.mark.parametrize(
    ("host", "advertised", "url"),
    [
        ("10.0.0.5", "", "http://10.0.0.5:8001"),
        ("fd00::1", "", "http://[fd00::1]:8001"),
        ("0.0.0.0", "http://encoder:80/", "http://encoder:80"),
        ("0.0.0.0", "", "http://127.0.0.1:8001"),
    ],
)
def test_the_url_of_an_instance_is_its_address_or_the_one_that_it_is_given(
    host: str, advertised: str, url: str
) -> None:
    assert own_url(host, 8001, ["http://127.0.0.1:8000"], advertised) == url


def test_an_instance_can_start_before_the_name_of_its_proxy_is_known(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("chiasm.server.advertise._SOMEWHERE", ("127.0.0.1", 9))
    assert own_url("0.0.0.0", 8001, ["http://proxy.invalid:8000"], "") == "http://127.0.0.1:8001"
    assert "proxies will be told 127.0.0.1" in caplog.text
