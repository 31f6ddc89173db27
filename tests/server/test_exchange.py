"""Every request: identity, deadline, bounds, disconnect, errors."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import openai
import pytest

from chiasm.engine.request import GenerateRequest, Output
from chiasm.http.config import HttpConfig
from chiasm.server import ServerConfig, create_app
from chiasm.wire import Role
from tests.server.conftest import Served, ServedEncoder
from tests.server.fake_engine import FakeLanguageEngine, never
from tests.server.images import chat, image_part, png
from tests.server.serving import eventually, get, post, request, serving


def metrics(url: str) -> list[str]:
    return get(f"{url}/metrics").body.decode().splitlines()


class TestIdentity:
    def test_request_id_of_the_client_is_echoed(self, pd: Served) -> None:
        reply = post(pd.chat, chat("x"), {"X-Request-Id": "my-id.7"})
        assert reply.headers["x-request-id"] == "my-id.7"
        assert reply.json["id"] == "chatcmpl-my-id.7"

    def test_errors_carry_the_request_id_too(self, pd: Served) -> None:
        assert post(pd.chat, {}, {"X-Request-Id": "my-id"}).headers["x-request-id"] == "my-id"

    @pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, 'a"b', "ä"])
    def test_other_ids_are_replaced(self, pd: Served, given: str | None) -> None:
        headers = {} if given is None else {"X-Request-Id": given}
        reply = post(pd.chat, chat("x"), headers)
        assert reply.status == 200
        assert len(reply.headers["x-request-id"]) == 32

    def test_same_id_twice_is_two_requests_for_the_engine(self, pd: Served) -> None:
        for _ in range(2):
            post(pd.chat, chat("x"), {"X-Request-Id": "again"})
        assert len({request.request_id for request in pd.engine.requests}) == 2


class TestDeadline:
    def test_callers_deadline_reaches_the_engine(self, pd: Served) -> None:
        before = time.monotonic()
        post(pd.chat, chat("x"), {"X-Request-Deadline-Ms": "7000"})
        assert before + 7 <= pd.engine.requests[0].deadline <= time.monotonic() + 7

    def test_callers_deadline_cannot_exceed_the_servers(self, pd: Served) -> None:
        post(pd.chat, chat("x"), {"X-Request-Deadline-Ms": "99999999"})
        assert pd.engine.requests[0].deadline <= time.monotonic() + 20

    @pytest.mark.parametrize(("value", "status"), [("soon", 400), ("1.5", 400), ("0", 504), ("-5", 504)])
    def test_a_malformed_or_past_deadline_is_refused(self, pd: Served, value: str, status: int) -> None:
        assert post(pd.chat, chat("x"), {"X-Request-Deadline-Ms": value}).status == status
        assert pd.engine.requests == []

    def test_an_engine_that_misses_the_deadline_is_interrupted(self, pd: Served) -> None:
        pd.engine.script = never
        reply = post(pd.chat, chat("x"), {"X-Request-Deadline-Ms": "3000"})
        assert reply.status == 504
        assert reply.error["type"] == "timeout_error"
        assert "total" in reply.timing
        pd.engine.aborted.get(timeout=60)


class TestBounds:
    def test_body_over_the_limit_is_refused_by_its_declared_length(self, pd: Served) -> None:
        reply = post(pd.chat, b"x" * 400_001)
        assert reply.status == 413
        assert reply.error["type"] == "invalid_request_error"
        assert "400000 bytes" in reply.error["message"]

    def test_body_over_the_limit_is_refused_without_a_declared_length(self, pd: Served) -> None:
        connection = http.client.HTTPConnection(urlsplit(pd.url).netloc, timeout=30)
        connection.request("POST", "/v1/chat/completions", iter([b"x" * 100_000] * 5), encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()

    def test_one_request_too_many_is_told_to_try_again(self) -> None:
        engine = FakeLanguageEngine(Role.PD)
        engine.script = never
        app = create_app(engine, served_model_name="bytes", config=ServerConfig(max_inflight_requests=1))
        with serving(app) as url:
            first = http.client.HTTPConnection(urlsplit(url).netloc)
            first.request("POST", "/v1/completions", json.dumps({"prompt": "x"}))
            engine.started.get(timeout=60)
            reply = post(f"{url}/v1/completions", {"prompt": "x"})
            assert reply.status == 503
            assert reply.headers["retry-after"] == "1"
            first.close()
            eventually(lambda: "chiasm_http_requests_in_flight 0.0" in metrics(url))
            engine.script = None
            assert post(f"{url}/v1/completions", {"prompt": "x"}).status == 200

    def test_bodies_together_are_bounded(self) -> None:
        config = ServerConfig(max_inflight_body_bytes=100)
        with serving(create_app(FakeLanguageEngine(Role.PD), served_model_name="bytes", config=config)) as url:
            assert post(f"{url}/v1/completions", {"prompt": "x" * 100}).status == 503
            for _ in range(5):
                assert post(f"{url}/v1/completions", {"prompt": "x" * 50}).status == 200

    def test_a_body_that_does_not_come_is_an_error(self) -> None:
        config = ServerConfig(http=HttpConfig(body_timeout_seconds=0.1))
        app = create_app(FakeLanguageEngine(Role.PD), served_model_name="bytes", config=config)
        with serving(app) as url:
            connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
            connection.putrequest("POST", "/v1/completions")
            connection.putheader("Content-Length", "1000")
            connection.endheaders(b'{"prompt"')
            assert connection.getresponse().status == 408
            connection.close()


class TestDisconnect:
    @pytest.mark.parametrize("stream", [False, True])
    def test_client_that_leaves_before_the_first_output_aborts_the_request(self, pd: Served, stream: bool) -> None:
        pd.engine.script = never
        connection = http.client.HTTPConnection(urlsplit(pd.url).netloc)
        connection.request("POST", "/v1/chat/completions", json.dumps(chat("x", stream=stream)))
        started = pd.engine.started.get(timeout=60)
        connection.close()
        assert pd.engine.aborted.get(timeout=60) == started

    def test_client_that_leaves_is_counted_with_status_499(self) -> None:
        engine = FakeLanguageEngine(Role.PD)
        engine.script = never
        with serving(create_app(engine, served_model_name="bytes")) as url:
            connection = http.client.HTTPConnection(urlsplit(url).netloc)
            connection.request("POST", "/v1/completions", json.dumps({"prompt": "x"}))
            engine.started.get(timeout=60)
            assert "chiasm_http_requests_in_flight 1.0" in metrics(url)
            connection.close()
            engine.aborted.get(timeout=60)
            eventually(lambda: "chiasm_http_requests_in_flight 0.0" in metrics(url))
            lines = metrics(url)
            assert 'chiasm_http_requests_total{path="/v1/completions",status="499"} 1.0' in lines
            assert 'chiasm_request_seconds_count{path="/v1/completions"} 1.0' in lines

    def test_client_that_leaves_a_stream_aborts_the_request(self, pd: Served) -> None:
        async def script(request: GenerateRequest) -> AsyncIterator[Output]:
            yield pd.engine.output(request, "a")
            async for output in never(request):
                yield output

        pd.engine.script = script
        stream = pd.client.chat.completions.create(
            model="bytes", messages=[{"role": "user", "content": "x"}], stream=True
        )
        next(iter(stream))
        stream.close()
        assert pd.engine.aborted.get(timeout=60) == pd.engine.requests[0].request_id

    def test_client_that_leaves_aborts_all_prompts(self, pd: Served) -> None:
        pd.engine.script = never
        connection = http.client.HTTPConnection(urlsplit(pd.url).netloc)
        connection.request("POST", "/v1/completions", json.dumps({"prompt": ["a", "b"]}))
        started = {pd.engine.started.get(timeout=60), pd.engine.started.get(timeout=60)}
        connection.close()
        assert {pd.engine.aborted.get(timeout=60), pd.engine.aborted.get(timeout=60)} == started

    def test_client_that_leaves_an_encoder_cancels_the_encoding(self, encoder: ServedEncoder) -> None:
        encoder.engine.encode_blocks = True
        connection = http.client.HTTPConnection(urlsplit(encoder.url).netloc)
        connection.request("POST", "/v1/chat/completions", json.dumps(chat(image_part(png()))))
        started = encoder.engine.started.get(timeout=60)
        connection.close()
        assert encoder.engine.aborted.get(timeout=60) == started

    def test_client_that_leaves_in_the_middle_of_its_body_harms_nobody(self, pd: Served) -> None:
        connection = http.client.HTTPConnection(urlsplit(pd.url).netloc)
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b'{"prompt"')
        connection.close()
        assert post(pd.completions, {"prompt": "x"}).status == 200

    def test_request_that_ends_by_itself_is_not_aborted(self, pd: Served) -> None:
        post(pd.chat, chat("x", stream=True))
        assert pd.engine.aborted.empty()


class TestPaths:
    def test_unknown_path(self, pd: Served) -> None:
        reply = get(f"{pd.url}/v1/images/generations")
        assert reply.status == 404
        assert reply.error["type"] == "not_found_error"

    def test_wrong_method(self, pd: Served) -> None:
        reply = get(pd.chat)
        assert reply.status == 405
        assert "GET" in reply.error["message"]
        assert request("DELETE", f"{pd.url}/health").status == 405

    def test_connection_serves_several_requests(self, pd: Served) -> None:
        connection = http.client.HTTPConnection(urlsplit(pd.url).netloc, timeout=30)
        for body, status in ((chat("x"), 200), ({}, 400), (chat("x", stream=True), 200), (chat("x"), 200)):
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            response = connection.getresponse()
            response.read()
            assert response.status == status
        connection.close()


def test_engine_that_died_is_an_error_for_openai_clients(pd: Served) -> None:
    pd.engine.healthy = False
    with pytest.raises(openai.InternalServerError) as caught:
        pd.client.chat.completions.create(model="bytes", messages=[{"role": "user", "content": "x"}])
    assert caught.value.status_code == 503
    assert caught.value.code == "failed"
