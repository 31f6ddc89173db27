"""What holds for every request to a server of chiasm: identity, deadline, bounds, the client's leaving, errors."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest

from chiasm.errors import (
    ChiasmError,
    Code,
    DeadlineExceededError,
    InvalidRequestError,
    NotServedError,
    OverloadedError,
)
from chiasm.http import Exchange
from chiasm.http.body import Pace
from chiasm.http.endpoint import Bounds
from chiasm.http.limits import Limit
from tests.http.serving import BOUNDS, site


async def echo(exchange: Exchange) -> None:
    await exchange.reply(exchange.body)


async def never(exchange: Exchange) -> None:
    await asyncio.Event().wait()


def raising(error: Exception) -> Callable[[Exchange], Any]:
    async def handler(exchange: Exchange) -> None:
        raise error

    return handler


def post(url: str, body: bytes = b"x", **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(url, content=body, headers=named, timeout=30)


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_the_handler_gets_the_body_and_its_reply_is_the_answer() -> None:
    with site(echo) as server:
        response = post(server.url, b"hello")
        assert (response.status_code, response.content) == (200, b"hello")
    assert server.ended == [200]
    assert (server.admission.requests, server.admission.held_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("given", "kept"), [("my-id.7", True), ("", False), ("a b", False), ("x" * 129, False), ('a"b', False)]
)
def test_a_request_id_is_kept_if_it_is_harmless(given: str, kept: bool) -> None:
    with site(echo) as server:
        answered = post(server.url, x_request_id=given).headers["x-request-id"]
        assert answered == given if kept else len(answered) == 32


class TestDeadline:
    def test_a_handler_that_does_not_keep_it_is_ended(self) -> None:
        with site(never) as server:
            response = post(server.url, x_request_deadline_ms="100")
            assert response.status_code == 504
            assert error_of(response)["code"] == Code.DEADLINE_EXCEEDED
        assert server.ended == [504]

    def test_a_handler_may_raise_a_more_precise_error_within_the_grace(self) -> None:
        async def handler(exchange: Exchange) -> None:
            await asyncio.sleep(exchange.seconds_left)
            raise DeadlineExceededError("The image was late.")

        with site(handler, Bounds(20, 1000, grace_seconds=15)) as server:
            assert error_of(post(server.url, x_request_deadline_ms="50"))["message"] == "The image was late."

    def test_the_client_can_only_shorten_it(self) -> None:
        left: list[float] = []

        async def handler(exchange: Exchange) -> None:
            left.append(exchange.seconds_left)
            await exchange.reply(b"")

        with site(handler) as server:
            post(server.url, x_request_deadline_ms="99999999")
            post(server.url, x_request_deadline_ms="9000")
        assert 9 < left[0] <= 20
        assert left[1] <= 9

    @pytest.mark.parametrize(("given", "status"), [("soon", 400), ("1.5", 400), ("0", 504), ("-5", 504)])
    def test_a_deadline_that_is_malformed_or_past_is_refused(self, given: str, status: int) -> None:
        with site(echo) as server:
            assert post(server.url, x_request_deadline_ms=given).status_code == status

    def test_a_timeout_of_the_handler_itself_is_not_taken_for_the_deadline(self) -> None:
        with site(raising(TimeoutError())) as server:
            assert post(server.url).status_code == 500


class TestBounds:
    def test_a_body_that_declares_to_be_too_large_is_refused_before_it_is_read(self) -> None:
        with site(echo) as server:
            connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
            connection.putrequest("POST", "/")
            connection.putheader("Content-Length", "1001")
            connection.endheaders()
            response = connection.getresponse()
            assert response.status == 413
            assert json.loads(response.read())["error"]["code"] == Code.BODY_TOO_LARGE
            connection.close()

    def test_a_body_without_a_declared_length_is_refused_when_it_becomes_too_large(self) -> None:
        with site(echo) as server:
            connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
            connection.request("POST", "/", iter([b"x" * 600] * 2), encode_chunked=True)
            assert connection.getresponse().status == 413
            connection.close()
        assert server.admission.held_bytes == 0

    def test_a_body_that_does_not_arrive_in_time_is_refused(self) -> None:
        with site(echo, Bounds(20, 1000, Pace(timeout_seconds=0.1))) as server:
            connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
            connection.putrequest("POST", "/")
            connection.putheader("Content-Length", "10")
            connection.endheaders(b"half")
            assert connection.getresponse().status == 408
            connection.close()

    def test_a_body_that_arrives_too_slowly_is_refused(self) -> None:
        pace = Pace(min_bytes_per_second=1e9, grace_seconds=0.1)
        with site(echo, Bounds(20, 1000, pace)) as server:
            connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
            connection.putrequest("POST", "/")
            connection.putheader("Content-Length", "10")
            connection.endheaders(b"half")
            response = connection.getresponse()
            assert response.status == 408
            assert "bytes a second" in json.loads(response.read())["error"]["message"]
            connection.close()
        assert server.admission.refusals.count(Limit.BODY_RATE) == 1

    def test_the_more_of_a_body_has_arrived_the_longer_it_may_take(self) -> None:
        pace = Pace(timeout_seconds=60, min_bytes_per_second=1000, grace_seconds=10)
        assert [pace.seconds_for_more(size) for size in (0, 10_000, 20_000, 10**6)] == [10, 10, 20, 60]

    def test_one_request_too_many_is_told_to_come_again(self) -> None:
        entered, leave = threading.Event(), threading.Event()

        async def handler(exchange: Exchange) -> None:
            entered.set()
            await asyncio.to_thread(leave.wait, 20)
            await exchange.reply(b"")

        with site(handler, max_requests=1) as server:
            first = threading.Thread(target=post, args=(server.url,))
            first.start()
            assert entered.wait(20)
            response = post(server.url)
            leave.set()
            first.join()
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")
            assert error_of(response)["code"] == Code.TOO_MANY_REQUESTS
            assert post(server.url).status_code == 200

    def test_bodies_of_all_requests_together_are_bounded(self) -> None:
        with site(echo, max_held_bytes=500) as server:
            assert post(server.url, b"x" * 501).status_code == 503
            assert [post(server.url, b"x" * 500).status_code for _ in range(3)] == [200] * 3

    def test_bytes_that_are_released_early_are_free_for_others(self) -> None:
        held: list[int] = []

        async def handler(exchange: Exchange) -> None:
            exchange.hold(50)
            exchange.release(keep_bytes=10)
            held.append(server.admission.held_bytes)
            assert exchange.body
            exchange.release()
            held.append(server.admission.held_bytes)
            assert not exchange.body
            await exchange.reply(b"")

        with site(handler) as server:
            assert post(server.url, b"x" * 100).status_code == 200
            assert held == [10, 0]


class TestClientThatLeaves:
    def test_it_cancels_the_handler(self) -> None:
        cancelled, entered = threading.Event(), threading.Event()

        async def handler(exchange: Exchange) -> None:
            entered.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        with site(handler) as server:
            connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
            connection.request("POST", "/", b"x")
            assert entered.wait(20)
            connection.close()
            assert cancelled.wait(20)
        assert server.ended == [499]
        assert server.errors == []

    def test_in_the_middle_of_its_body_it_harms_nobody(self) -> None:
        with site(echo) as server:
            connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
            connection.putrequest("POST", "/")
            connection.putheader("Content-Length", "100")
            connection.endheaders(b"half")
            connection.close()
            assert post(server.url).status_code == 200
        assert sorted(server.ended, key=str) == [200, 499]
        assert server.admission.held_bytes == 0


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "status", "kind"),
        [
            (InvalidRequestError("Wrong.", param="n"), 400, "invalid_request_error"),
            (OverloadedError("Full.", retry_after_seconds=7, code=Code.STARTING), 503, "overloaded_error"),
            (ChiasmError("Broken."), 500, "internal_error"),
        ],
    )
    def test_they_become_answers_in_the_shape_of_openai(self, error: ChiasmError, status: int, kind: str) -> None:
        with site(raising(error)) as server:
            response = post(server.url)
            assert response.status_code == status
            expected = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
            assert error_of(response) == expected
            assert response.headers.get("retry-after") == ("7" if status == 503 else None)
            assert response.headers["x-noted"] == "yes"

    def test_they_have_the_type_by_which_clients_of_anthropics_api_know_an_error(self) -> None:
        with site(raising(ChiasmError("Broken."))) as server:
            assert post(server.url).json()["type"] == "error"

    @pytest.mark.parametrize(
        ("error", "told"),
        [
            (NotServedError("/v1/embeddings"), "false"),
            (DeadlineExceededError("Too late."), "false"),
            (OverloadedError("Full."), None),
            (ChiasmError("Broken."), None),
        ],
    )
    def test_one_that_every_attempt_would_get_tells_clients_not_to_repeat_the_request(
        self, error: ChiasmError, told: str | None
    ) -> None:
        with site(raising(error)) as server:
            assert post(server.url).headers.get("x-should-retry") == told

    def test_an_unexpected_one_shows_no_details(self, caplog: pytest.LogCaptureFixture) -> None:
        with site(raising(ValueError("secret"))) as server:
            response = post(server.url)
        assert response.status_code == 500
        assert "secret" not in response.text
        assert "secret" in caplog.text

    @pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n"])
    def test_one_after_the_end_of_a_whole_stream_is_not_told(self, end: str) -> None:
        whole = f"data: one{end}data: [DONE]{end}".encode()

        async def handler(exchange: Exchange) -> None:
            exchange.deadline = time.monotonic()
            await exchange.start_events()
            await exchange.write(whole)
            async with exchange.until_deadline():
                await never(exchange)

        with site(handler) as server:
            assert post(server.url).content == whole

    def test_one_in_a_stream_is_its_last_event(self) -> None:
        async def handler(exchange: Exchange) -> None:
            await exchange.start_events()
            await exchange.write(b"data: one\n\n")
            raise OverloadedError("No more.", code=Code.STOPPING)

        with site(handler) as server:
            response = post(server.url)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        first, last = response.content.removesuffix(b"\n\n").split(b"\n\n")
        assert first == b"data: one"
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "stopping"

    def test_one_after_the_answer_changes_nothing(self) -> None:
        async def handler(exchange: Exchange) -> None:
            await exchange.reply(b"all")
            raise InvalidRequestError("Too late.")

        with site(handler) as server:
            assert post(server.url).content == b"all"

    def test_unknown_paths_and_methods(self) -> None:
        with site(echo) as server:
            unknown = httpx.post(f"{server.url}/other", timeout=30)
            wrong = httpx.get(server.url, timeout=30)
        assert (unknown.status_code, error_of(unknown)["type"]) == (404, "not_found_error")
        assert (wrong.status_code, error_of(wrong)["type"]) == (405, "invalid_request_error")


def test_interrupting_all_ends_each_with_the_reason() -> None:
    entered = threading.Event()

    async def handler(exchange: Exchange) -> None:
        entered.set()
        await asyncio.Event().wait()

    with site(handler, BOUNDS) as server:
        answers: list[httpx.Response] = []
        waiting = threading.Thread(target=lambda: answers.append(post(server.url)))
        waiting.start()
        assert entered.wait(20)
        reason = OverloadedError("Shutting down.", code=Code.STOPPING)
        server.loop.call_soon_threadsafe(server.admission.interrupt_all, reason)
        waiting.join(20)
    assert error_of(answers[0])["code"] == "stopping"
