"""What instances and proxies say about themselves, and servers that only look like them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from chiasm.doctor.client import Client, Limits, NoAnswerError
from chiasm.doctor.observed import Observed, ObservedProxy, ask_instance, ask_proxy
from chiasm.doctor.running import examine_proxy
from chiasm.launch.ports import HeldPort
from chiasm.wire import Health
from tests.doctor import played
from tests.doctor.results import collected, problem, verdicts
from tests.doctor.test_client import silent, talking


@asynccontextmanager
async def answering(pages: dict[str, Any], status: int = 200) -> AsyncIterator[str]:
    """A server with these pages: text as it is, anything else as JSON."""

    async def page(request: web.Request) -> web.Response:
        if request.path not in pages:
            return web.Response(status=404, text="nothing here")
        content = pages[request.path]
        return web.Response(status=status, text=content if isinstance(content, str) else json.dumps(content))

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", page)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def instance(pages: dict[str, Any], status: int = 200) -> Observed:
    async with answering(pages, status) as url, Client() as client:
        return await ask_instance(client, url, "pd")


async def proxy(page: Any) -> ObservedProxy:
    async with answering({"/health": page}) as url, Client() as client:
        return await ask_proxy(client, url)


async def test_vllm_without_middleware_is_recognized() -> None:
    models = {"data": [{"id": "m", "max_model_len": 128}]}
    found = await instance({"/health": "", "/v1/models": models, "/version": {"version": "0.32.0"}})
    assert (found.health.model, found.engine, found.health.max_model_len) == ("m", "vllm 0.32.0", 128)
    assert not found.trouble
    assert not found.health.role


@pytest.mark.parametrize(
    ("pages", "trouble"),
    [
        ({}, "answered something that isn't JSON: 'nothing here'"),
        ({"/health": "<html>"}, "isn't JSON"),
        ({"/health": ["ok"]}, "JSON that chiasm doesn't understand"),
        ({"/health": {"status": "ok"}}, "isn't an instance that chiasm knows"),
        ({"/health": {"status": "ok", "role": "king"}}, "isn't an instance that chiasm knows"),
        ({"/health": {"status": "ok", "role": ["pd"]}}, r"doesn't understand: .*\$\.role"),
        ({"/health": {"status": "ok", "instances": []}}, "is a proxy"),
        ({"/health": ""}, "neither chiasm nor vLLM"),
        ({"/health": "", "/v1/models": {"data": [1]}}, "neither chiasm nor vLLM"),
        (
            {"/health": {"status": "failed", "message": "no memory\x1b[2J"}},
            r"is not healthy \(HTTP 200\): failed: no memory\?\[2J",
        ),
    ],
)
async def test_everything_but_a_healthy_instance_is_in_trouble(pages: dict[str, Any], trouble: str) -> None:
    with pytest.raises(AssertionError, match=trouble):
        raise AssertionError((await instance(pages)).trouble)


async def test_a_starting_instance_is_in_trouble() -> None:
    assert (await instance({"/health": {"status": "loading"}}, 503)).trouble == "is not healthy (HTTP 503): loading"


@pytest.mark.parametrize(
    "said",
    [
        {"model": 7},
        {"fingerprint": None},
        {"ec_store": {}},
        {"max_model_len": "long"},
        {"cpus": [0, "1"]},
        {"threads": 1e400},
        {"threads": 10**18},
    ],
)
async def test_an_instance_whose_fields_have_other_types_is_in_trouble(said: dict[str, Any]) -> None:
    found = await instance({"/health": {"status": "ok", "role": "pd"} | said})
    assert found.trouble.startswith("answered")
    assert found.health == Health()


async def test_absurd_numbers_are_dropped() -> None:
    said = {"status": "ok", "role": "pd", "threads": 10**15, "cpus": [*range(10_000)]}
    health = (await instance({"/health": said})).health
    assert (health.threads, len(health.cpus)) == (None, 4096)


async def test_text_is_made_fit_for_a_terminal() -> None:
    said = {"status": "ok", "role": "pd", "model": "m\x1b[2J" + "x" * 1000}
    model = (await instance({"/health": said})).health.model
    assert model.startswith("m?[2Jx")
    assert len(model) == 201


async def test_instances_without_usable_role_or_url_are_left_out() -> None:
    good = {"url": "http://a:1/", "role": "pd", "state": "healthy", "reason": None}
    others = [
        {},
        {"url": "file:///etc/passwd", "role": "pd"},
        {"url": "http://[", "role": "pd"},
        good | {"role": "king"},
    ]
    found = await proxy({"status": "ok", "models": ["m"], "instances": [*others, good]})
    assert [one.url for one in found.health.instances] == ["http://a:1"]


async def test_a_malformed_list_of_instances_is_explained() -> None:
    with pytest.raises(NoAnswerError, match=r"doesn't understand: .*\$\.instances"):
        await proxy({"status": "ok", "models": ["m"], "instances": [1]})


async def test_a_long_list_of_instances_is_cut() -> None:
    one = {"url": "http://a:1", "role": "pd", "state": "healthy"}
    found = await proxy({"status": "ok", "models": [], "instances": [one] * 300})
    assert (len(found.health.instances), found.left_out) == (256, 44)


async def test_a_server_that_is_no_proxy_is_explained() -> None:
    with pytest.raises(NoAnswerError, match=r"is an instance \(aggregated\), not a proxy"):
        await proxy({"status": "ok", "role": "aggregated"})
    with pytest.raises(NoAnswerError, match="isn't chiasm's proxy"):
        await proxy({"hello": "world"})


async def test_instances_that_only_the_proxy_reaches_are_skipped() -> None:
    nobody = HeldPort("127.0.0.1")
    hidden = nobody.url
    async with played.encoder() as encoder:
        listed = [
            {"url": encoder.url, "role": "encoder", "state": "healthy"},
            {"url": hidden, "role": "pd", "state": "healthy"},
        ]
        pages = {
            "/health": {"status": "ok", "models": ["m"], "instances": listed},
            "/v1/chat/completions": {"choices": []},
        }
        encoder.adds = {}
        async with answering(pages) as url:
            found = await collected(examine_proxy(url, limits=Limits(message_seconds=20, count_seconds=0)))
    nobody.release()
    assert hidden in next(one.says for one in found if one.check == "instances" and one.verdict == "skipped")
    assert "problem" not in verdicts(found)
    assert verdicts(found, "through the proxy") == ["warning"]


async def test_a_fleet_for_text_alone_is_sent_no_image() -> None:
    nobody = HeldPort("127.0.0.1")
    listed = [{"url": nobody.url, "role": "pd", "state": "healthy"}]
    async with answering({"/health": {"status": "ok", "models": ["m"], "instances": listed}}) as url:
        found = await collected(examine_proxy(url, limits=Limits(message_seconds=20, count_seconds=0)))
    nobody.release()
    assert verdicts(found, "roles") == ["warning"]
    assert verdicts(found, "through the proxy") == ["skipped"]
    assert "problem" not in verdicts(found)


async def test_an_instance_that_hangs_is_a_problem_whatever_the_proxy_says() -> None:
    async with talking(silent) as hanging:
        listed = [{"url": hanging, "role": "pd", "state": "healthy"}]
        pages = {"/health": {"status": "ok", "models": ["m"], "instances": listed}}
        async with answering(pages) as url:
            found = await collected(examine_proxy(url, limits=Limits(message_seconds=20, page_seconds=3)))
    assert [one.says for one in found if one.check == "instances"] == [f"pd {hanging} did not answer within 3 s"]
    assert verdicts(found, "instances") == ["problem"]


async def test_a_server_that_is_no_proxy_is_the_only_problem() -> None:
    async with answering({"/health": "<html>"}) as url:
        found = await collected(examine_proxy(url, limits=Limits()))
    assert len(found) == 1
    assert "isn't JSON" in problem(found).says
