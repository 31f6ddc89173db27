"""The proxy's front door: what it refuses before it fetches or encodes, and what it says and logs."""

from __future__ import annotations

import gzip
import json
import logging
import re
from typing import Any

import httpx2 as httpx
import pytest
from aiohttp import web

from chiasm.http.config import HttpConfig
from chiasm.proxy import ProxyConfig, create_app
from chiasm.wire import MESSAGES_PATH, ModelList, model_card

from .conftest import Front, Images, Start, ask, image, image_bytes, listen
from .instances import MODEL, VLLM, FakeInstance, Received, begin_stream, error_event, error_of, event, refuse

KEY = "right" * 4
ADMIN_KEY = "admin" * 4
RIGHT = {"Authorization": f"Bearer {KEY}"}
WRONG = {"Authorization": "Bearer wrong"}


def keyed(role: str, **health: Any) -> FakeInstance:
    """Return an instance that needs a key and says so."""
    instance = FakeInstance(role, needs_key=True, **health)
    instance.key = KEY
    return instance


async def refusal(front: Front, images: Images, **headers: str) -> dict[str, Any]:
    """Return the error for a request about an image, after checking that nobody was bothered by it."""
    answer = await front.post(ask("x", image(await images(image_bytes()))), **headers)
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert images.fetched == 0
    assert not any(instance.received for instance in front.instances)
    return answer.error


class TestKeys:
    async def test_a_proxy_with_a_key_refuses_others_before_it_does_anything(
        self, start: Start, images: Images
    ) -> None:
        front = await start([FakeInstance("encoder"), FakeInstance("pd")], http=HttpConfig(api_key=(KEY,)))
        for headers in ({}, WRONG):
            assert (await refusal(front, images, **headers))["code"] == "invalid_api_key"
        assert (await front.get("/v1/models")).status == 401
        assert [(await front.get(path)).status for path in ("/health", "/metrics")] == [200, 200]
        assert (await front.post(ask("x", image(await images(image_bytes()))), **RIGHT)).status == 200
        assert [one.headers["Authorization"] for one in front.instances[1].received] == [RIGHT["Authorization"]]

    async def test_a_key_may_come_as_clients_of_anthropic_send_it(self, start: Start) -> None:
        front = await start([FakeInstance("pd")], http=HttpConfig(api_key=(KEY,)))
        assert (await front.post(ask("x"), **{"X-Api-Key": KEY})).status == 200
        assert (await front.post(ask("x"), **{"X-Api-Key": KEY, **WRONG})).status == 401
        assert [one.headers["Authorization"] for one in front.instances[0].received] == [RIGHT["Authorization"]]

    @pytest.mark.parametrize(
        ("keys", "here", "elsewhere", "with_the_admin_key"),
        [
            ({}, 200, 200, 200),
            ({"http": HttpConfig(api_key=(KEY,))}, 200, 401, 401),
            ({"http": HttpConfig(keys_of_instances=("short",))}, 200, 401, 401),
            ({"admin_key": ADMIN_KEY}, 401, 401, 200),
            ({"admin_key": ADMIN_KEY, "http": HttpConfig(api_key=(KEY,))}, 401, 401, 200),
            ({"admin_key": ADMIN_KEY, "http": HttpConfig(api_key=(KEY,)), "open_metrics": True}, 200, 200, 200),
            ({"http": HttpConfig(api_key=(KEY,)), "open_metrics": True}, 200, 200, 200),
        ],
    )
    async def test_metrics_are_for_the_operator_where_anything_needs_a_key(
        self, keys: dict[str, Any], here: int, elsewhere: int, with_the_admin_key: int
    ) -> None:
        app = create_app(ProxyConfig(**keys))

        async def status(client: str, key: str | None = None, **headers: str) -> int:
            transport = httpx.ASGITransport(app=app, client=(client, 1))
            given = headers if key is None else headers | {"Authorization": f"Bearer {key}"}
            async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as session:
                return (await session.get("/metrics", headers=given)).status_code

        assert await status("127.0.0.1") == here
        assert await status("192.0.2.1") == await status("192.0.2.1", KEY) == elsewhere
        assert await status("127.0.0.1", **{"X-Forwarded-For": "192.0.2.1"}) == elsewhere
        assert await status("192.0.2.1", ADMIN_KEY) == with_the_admin_key

    @pytest.mark.parametrize("roles", [("encoder", "pd"), ("encoder", "prefill", "decode"), ("aggregated",)])
    async def test_a_proxy_without_one_asks_an_instance_that_needs_one(
        self, start: Start, images: Images, roles: tuple[str, ...]
    ) -> None:
        front = await start([keyed(role) for role in roles])
        for headers in ({}, WRONG):
            assert (await refusal(front, images, **headers))["code"] == "invalid_api_key"
        assert (await front.post(ask("x", image(await images(image_bytes()))), **RIGHT)).status == 200

    async def test_it_refuses_text_in_the_same_way(self, start: Start) -> None:
        front = await start([keyed("pd")])
        assert (await front.post(ask("x"), **WRONG)).error["code"] == "invalid_api_key"
        assert (await front.post(ask("x"), **RIGHT)).status == 200
        assert len(front.instances[0].received) == 1

    async def test_a_key_that_was_accepted_is_not_asked_for_again_soon(self, start: Start) -> None:
        pd = keyed("pd")
        front = await start([keyed("encoder"), pd])
        for colour in ("red", "blue", "green"):
            assert (await front.post(ask("x", image(image_bytes(colour))), **RIGHT)).status == 200
        assert pd.models_asked == 1

    async def test_no_instance_is_asked_where_none_needs_a_key(self, start: Start) -> None:
        front = await start([FakeInstance("encoder"), FakeInstance("pd")])
        assert (await front.post(ask("x", image(image_bytes())), **WRONG)).status == 200
        assert front.instances[1].models_asked == 0

    async def test_vllm_without_the_middleware_is_asked_for_its_models_with_the_proxys_key(self, start: Start) -> None:
        pd = FakeInstance("pd")
        pd.health, pd.key = None, KEY
        front = await start([pd], http=HttpConfig(api_key=(KEY, "other" * 4)))
        assert (await front.post(ask("x"), **RIGHT)).status == 200

    async def test_such_an_instance_is_unusable_without_a_key_and_the_reason_is_given(self, start: Start) -> None:
        pd = FakeInstance("pd")
        pd.health, pd.key = None, KEY
        front = await start([pd])
        (shown,) = (await front.get("/health")).json["instances"]
        assert "--api-key" in shown["reason"]


class TestModels:
    async def test_a_card_has_the_fields_of_vllms(self, start: Start) -> None:
        front = await start([FakeInstance("pd")])
        (card,) = (await front.get("/v1/models/")).json["data"]
        assert card | {"created": 0, "permission": []} == {
            "id": MODEL,
            "object": "model",
            "created": 0,
            "owned_by": "chiasm",
            "root": MODEL,
            "parent": None,
            "max_model_len": 4096,
            "permission": [],
        }
        (permission,) = card["permission"]
        assert permission["object"] == "model_permission"
        assert permission["allow_sampling"] is True
        assert (await front.get(f"/v1/models/{MODEL}/")).json == card

    def test_the_same_type_writes_and_reads_them(self) -> None:
        card = model_card("m", created=5, max_model_len=7)
        assert ModelList(data=[card]).data[0].permission[0].created == 5


class TestStreams:
    async def test_no_proxy_may_hold_them_up(self, start: Start) -> None:
        front = await start([FakeInstance("pd")])
        answer = await front.post(ask("x", stream=True))
        assert (answer.headers["X-Accel-Buffering"], answer.headers["Cache-Control"]) == ("no", "no-cache")

    @pytest.mark.parametrize("roles", [("pd",), ("prefill", "decode")])
    @pytest.mark.parametrize(("config", "header"), [("off", None), ("on", "off")])
    async def test_timing_can_be_left_out(
        self, start: Start, roles: tuple[str, ...], config: str, header: str | None
    ) -> None:
        front = await start([FakeInstance(role) for role in roles], http=HttpConfig(timing_comments=config))
        answer = await front.post(ask("x", stream=True), **({"X-Timing-Comments": header} if header else {}))
        assert answer.body.endswith(b"data: [DONE]\n\n")
        own = answer.body.count(b": server-timing") - answer.body.count(b": server-timing prefill;dur=3")
        own -= answer.body.count(b": server-timing decode;dur=3")
        assert own == 0
        assert {one.headers["X-Timing-Comments"] for instance in front.instances for one in instance.received} == {
            "off"
        }


class TestLog:
    @pytest.fixture(autouse=True)
    def level(self, caplog: pytest.LogCaptureFixture) -> None:
        for name in ("chiasm.requests", "chiasm.access"):
            caplog.set_level(logging.INFO, name)

    def lines(self, caplog: pytest.LogCaptureFixture) -> list[str]:
        return [one.getMessage() for one in caplog.records if one.name in ("chiasm.requests", "chiasm.access")]

    async def test_an_error_of_an_instance_is_logged_with_its_code(
        self, start: Start, caplog: pytest.LogCaptureFixture
    ) -> None:
        pd = FakeInstance("pd")
        pd.answer = refuse(400, "Too long.", code="context_length_exceeded")
        front = await start([pd])
        await front.post(ask("x"), **{"X-Request-Id": "me"})
        address = pd.url.removeprefix("http://")
        (line,) = self.lines(caplog)
        assert re.fullmatch(
            rf"id=me POST /v1/chat/completions status=400 model=tiny instances={address} seconds=\S+ proxy_ms=\S+ "
            r"estimate_ms=\S+ code=context_length_exceeded: Too long\.",
            line,
        )

    async def test_so_is_one_that_ends_a_stream(self, start: Start, caplog: pytest.LogCaptureFixture) -> None:
        async def break_down(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
            response = await begin_stream(request)
            await response.write(event("one"))
            await response.write(error_event(error_of("The engine failed.", "server_error", 500)))
            return response

        pd = FakeInstance("pd")
        pd.answer = break_down
        front = await start([pd])
        heard = await listen(front, ask("x", stream=True))
        assert heard.error is not None
        (line,) = self.lines(caplog)
        assert f"status=200 model=tiny instances={pd.url.removeprefix('http://')} seconds=" in line
        assert line.endswith(" code=500: The engine failed.")

    async def test_so_is_one_in_the_form_of_messages(self, start: Start, caplog: pytest.LogCaptureFixture) -> None:
        async def break_down(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
            response = await begin_stream(request)
            told = {"type": "error", "error": {"type": "internal_error", "message": "The engine failed."}}
            await response.write(f"event: error\ndata: {json.dumps(told)}\n\n".encode())
            return response

        pd = FakeInstance("pd", engine=VLLM["engine"])
        pd.answer = break_down
        front = await start([pd])
        assert (await front.post({"model": MODEL, "stream": True}, MESSAGES_PATH)).status == 200
        (line,) = self.lines(caplog)
        assert line.endswith(" code=internal_error: The engine failed.")

    async def test_each_request_has_a_line_with_its_tokens_and_stages_and_pages_have_none(
        self, start: Start, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def tell(instance: FakeInstance, request: web.Request, received: Received) -> web.StreamResponse:
            told = 'queue;dur=1.5, wait;dur=2, prefill;dur=3.25, ttft;dur=7, prompt_tokens;desc="12"'
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Server-Timing": told})
            await response.prepare(request)
            await response.write(event('completion_tokens;desc="9"'))
            await response.write(b': server-timing total;dur=9, completion_tokens;desc="3"\n\ndata: [DONE]\n\n')
            return response

        pd = FakeInstance("pd")
        pd.answer = tell
        front = await start([pd])
        await listen(front, ask("x", stream=True))
        assert (await front.get("/health")).status == 200
        (record,) = (await front.get("/requests")).json["requests"]
        await front.stop()
        (line,) = self.lines(caplog)
        found = dict(re.findall(r"(\w+)=(\S+)", line))
        assert {"prompt_tokens": "12", "completion_tokens": "3"}.items() <= found.items()
        assert {"queue_ms": "1.5", "wait_ms": "2.0", "prefill_ms": "3.2"}.items() <= found.items()
        assert float(found["decode_ms"]) <= 1000 * float(found["seconds"])
        assert record["tokens"] == {"prompt": 12, "completion": 3}
        assert {"queue", "prefill", "decode"} <= record["stages"].keys()

    async def test_a_log_of_failures_or_of_warnings_has_no_line_of_what_succeeds(
        self, start: Start, caplog: pytest.LogCaptureFixture
    ) -> None:
        front = await start([FakeInstance("pd")], http=HttpConfig(access_log="failures"))
        await front.post(ask("x"))
        caplog.set_level(logging.WARNING, "chiasm.access")
        quiet = await start([FakeInstance("pd")])
        await quiet.post(ask("x"))
        await front.stop()
        await quiet.stop()
        assert self.lines(caplog) == []

    async def test_no_prompt_and_no_key_gets_there(self, start: Start, caplog: pytest.LogCaptureFixture) -> None:
        front = await start([FakeInstance("pd")], http=HttpConfig(api_key=(KEY,), access_log="all"))
        await front.post(ask("a secret", stream=3), **RIGHT)
        await front.post(ask("a secret"), Authorization="Bearer a-secret-key")
        await front.post(ask("a secret"), "/v1/chat/completions?key=secret", **RIGHT)
        await front.stop()
        text = "".join(self.lines(caplog))
        assert text.count("status=") == 3
        assert "secret" not in text


async def test_compressed_bodies_reach_the_instance_as_they_were(start: Start) -> None:
    front = await start([FakeInstance("pd")])
    body = json.dumps(ask("x")).encode()
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    assert (await front.post(gzip.compress(body), **headers)).status == 200
    (received,) = front.instances[0].received
    assert received.body == body
    assert "Content-Encoding" not in received.headers
