"""What holds for every request before its route is looked up: id, path, origin, key, and the line that it leaves in the log."""

from __future__ import annotations

import gzip
import http.client
import io
import json
import logging
import re
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest

from chiasm.errors import Code, ConfigurationError, InvalidRequestError, OverloadedError
from chiasm.http import Exchange, watch
from chiasm.http.config import HttpConfig
from chiasm.http.endpoint import Bounds
from chiasm.http.flood import LINES_PER_WINDOW
from chiasm.http.front import FrontDoor
from chiasm.http.limits import Refusals
from chiasm.http.log_format import formatter
from chiasm.http.paths import normal_path
from tests.http.serving import BOUNDS, site
from tests.http.test_endpoint import echo, error_of, never, raising
from tests.launch.waiting import eventually

CHAT = "/v1/chat/completions"
ORIGIN = "https://app.example"
OPEN = HttpConfig(allowed_origins=(ORIGIN,))
FIRST, SECOND, THIRD = (name * 4 for name in ("first", "second", "third"))
KEYED = HttpConfig(api_key=(FIRST, SECOND))


def send(url: str, method: str = "POST", /, **given: Any) -> httpx.Response:
    """Send a request with ``content`` and headers, whose names have underscores."""
    content = given.pop("content", b"")
    headers = {name.replace("_", "-"): value for name, value in given.items()}
    return httpx.request(method, url, content=content, headers=headers, timeout=30)


async def streaming(exchange: Exchange) -> None:
    await exchange.start_events()
    await exchange.write(b'data: {"choices":[{"delta":{"content":"{\\"error\\": 1}"}}]}\n\n')
    await exchange.end_events(b"data: [DONE]\n\n")


async def breaking(exchange: Exchange) -> None:
    await exchange.start_events()
    await exchange.write(b"data: one\n\n")
    raise OverloadedError("No more.", code=Code.STOPPING)


class TestRequestId:
    @pytest.mark.parametrize(
        ("method", "path", "headers", "status"),
        [
            ("POST", "/", {}, 200),
            ("GET", "/page", {}, 200),
            ("HEAD", "/page", {}, 200),
            ("OPTIONS", "/page", {}, 204),
            ("OPTIONS", "/", {"origin": "https://b.example", "access-control-request-method": "POST"}, 400),
            ("POST", "/none", {}, 404),
            ("DELETE", "/page", {}, 405),
            ("POST", "/", {"x-request-deadline-ms": "soon"}, 400),
            ("POST", "/", {"content-encoding": "br"}, 415),
        ],
    )
    def test_every_answer_has_it(self, method: str, path: str, headers: dict[str, str], status: int) -> None:
        with site(echo) as server:
            mine = send(server.url + path, method, x_request_id="mine", **headers)
            other = send(server.url + path, method, x_request_id="not valid", **headers)
        assert (mine.status_code, mine.headers.get_list("x-request-id")) == (status, ["mine"])
        assert re.fullmatch("[0-9a-f]{32}", other.headers["x-request-id"])

    def test_a_refusal_at_admission_and_an_unexpected_error_have_it(self) -> None:
        with site(raising(ValueError("x")), max_held_bytes=1) as server:
            full = send(server.url, content=b"xx", x_request_id="a")
            broken = send(server.url, content=b"", x_request_id="b")
        assert (full.status_code, full.headers["x-request-id"]) == (503, "a")
        assert (broken.status_code, broken.headers["x-request-id"]) == (500, "b")


class TestErrors:
    def test_each_is_counted_by_its_code(self) -> None:
        with site(raising(InvalidRequestError("x", code=Code.TOO_MANY_IMAGES))) as server:
            refusals = server.admission.refusals
            for _ in range(2):
                send(server.url)
            send(f"{server.url}/none", "GET")
            send(server.url, content_encoding="br")
            send(f"{server.url}/page", "GET")
        counted = {code: refusals.count_errors(code) for code in (Code.TOO_MANY_IMAGES, Code.UNSUPPORTED_ENCODING)}
        assert counted == {Code.TOO_MANY_IMAGES: 2, Code.UNSUPPORTED_ENCODING: 1}
        assert refusals.count_errors("not_found_error") == 1
        assert refusals.count_errors("other") == 0

    def test_one_that_ends_a_stream_is_counted(self) -> None:
        with site(breaking) as server:
            send(server.url)
        assert server.admission.refusals.count_errors(Code.STOPPING) == 1

    def test_a_code_of_somebody_else_makes_no_label(self) -> None:
        refusals = Refusals()
        refusals.note_error("BadRequestError")
        assert refusals.count_errors("other") == 1


class TestPaths:
    @pytest.mark.parametrize("path", ["/page/", "//page", "/page//", "/v1/models/", "//v1//models//"])
    def test_a_slash_too_many_changes_nothing(self, path: str) -> None:
        with site(echo) as server:
            assert send(server.url + path, "GET").content == b"page"

    @pytest.mark.parametrize("path", [f"{CHAT}/", "/v1//chat/completions", "//v1/chat/completions/"])
    def test_no_redirect_loses_the_body(self, path: str) -> None:
        with site(echo) as server:
            response = send(server.url + path, content=b"body")
        assert (response.status_code, response.content) == (200, b"body")

    def test_the_name_of_a_model_may_be_a_path(self) -> None:
        assert normal_path("/v1/models//data/model/") == "/v1/models//data/model"
        assert normal_path("//v1//models/org/name") == "/v1/models/org/name"

    @pytest.mark.parametrize(
        ("path", "meant"),
        [
            ("/chat/completions", CHAT),
            ("/v1/chat/completion", CHAT),
            ("/v1/v1/chat/completions", CHAT),
            ("/V1/Chat/Completions", CHAT),
            ("/api/v1/chat/completions/", CHAT),
            ("/completions", "/v1/completions"),
            ("/v1/completion", "/v1/completions"),
            ("/v1/chat/completions/chat/completions", CHAT),
            ("/models", "/v1/models"),
            ("/v1/model", "/v1/models"),
        ],
    )
    def test_404_says_what_was_probably_meant(self, path: str, meant: str) -> None:
        with site(echo) as server:
            error = error_of(send(server.url + path))
        assert error["message"].startswith("POST /")
        assert error["message"].endswith(f"Did you mean {meant}?")

    @pytest.mark.parametrize("path", ["/x", "/v1/embeddings", "/v1/responses", "/" + "x/" * 5000])
    def test_404_suggests_nothing_for_what_is_like_nothing(self, path: str) -> None:
        with site(echo) as server:
            error = error_of(send(server.url + path))
        assert "Did you mean" not in error["message"]
        assert len(error["message"]) < 300

    def test_405_says_what_is_allowed_and_options_is_answered(self) -> None:
        with site(echo) as server:
            wrong, asked = send(server.url + CHAT, "GET"), send(server.url + CHAT, "OPTIONS")
            page = send(server.url + "/page")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "OPTIONS, POST")
        assert error_of(wrong)["message"].startswith(f"GET {CHAT}")
        assert (asked.status_code, asked.headers["allow"]) == (204, "OPTIONS, POST")
        assert page.headers["allow"] == "GET, HEAD, OPTIONS"

    def test_head_is_answered_where_get_is(self) -> None:
        with site(echo) as server:
            response = send(server.url + "/page", "HEAD")
        assert (response.status_code, response.headers["content-length"], response.content) == (200, "4", b"")


class TestOrigins:
    PREFLIGHT: dict[str, str] = {  # noqa: RUF012
        "access_control_request_method": "POST",
        "access_control_request_headers": "authorization,content-type",
    }

    def test_a_web_page_of_an_allowed_origin_may_ask(self) -> None:
        with site(echo, config=OPEN) as server:
            response = send(server.url + CHAT, "OPTIONS", origin=ORIGIN, **self.PREFLIGHT)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert "POST" in response.headers["access-control-allow-methods"]
        assert response.headers["access-control-allow-headers"] == "authorization,content-type"

    @pytest.mark.parametrize("config", [HttpConfig(), OPEN])
    def test_another_one_may_not_and_is_told_why(self, config: HttpConfig) -> None:
        with site(echo, config=config) as server:
            response = send(server.url + CHAT, "OPTIONS", origin="https://b.example", **self.PREFLIGHT)
            answer = send(server.url + CHAT, origin="https://b.example")
        assert response.status_code == 400
        assert "--allowed-origins" in error_of(response)["message"]
        assert "access-control-allow-origin" not in {**response.headers, **answer.headers}

    @pytest.mark.parametrize(
        ("handler", "path", "status"),
        [
            (echo, "/", 200),
            (streaming, "/", 200),
            (raising(InvalidRequestError("Wrong.")), "/", 400),
            (raising(ValueError("x")), "/", 500),
            (echo, "/none", 404),
        ],
    )
    def test_every_answer_says_that_the_page_may_read_it(self, handler: Any, path: str, status: int) -> None:
        with site(handler, config=OPEN) as server:
            response = send(server.url + path, origin=ORIGIN)
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert {"X-Request-Id", "Server-Timing"} <= set(response.headers["access-control-expose-headers"].split(", "))

    def test_any_origin_may_ask_if_all_are_allowed(self) -> None:
        with site(echo, config=HttpConfig(allowed_origins=("*",))) as server:
            assert send(server.url, origin="https://b.example").headers["access-control-allow-origin"] == "*"
        with site(echo, config=HttpConfig(allowed_origins=("*",), allow_credentials=True)) as server:
            headers = send(server.url, origin=ORIGIN).headers
        assert headers["access-control-allow-origin"] == ORIGIN
        assert headers["access-control-allow-credentials"] == "true"

    def test_a_stream_is_passed_on_event_by_event(self) -> None:
        heard = threading.Event()

        async def handler(exchange: Exchange) -> None:
            await exchange.start_events()
            await exchange.write(b"data: one\n\n")
            while not heard.is_set():
                await exchange.write(b": wait\n\n")
            await exchange.end_events(b"data: two\n\n")

        with (
            site(handler, config=OPEN) as server,
            httpx.stream("POST", server.url, headers={"origin": ORIGIN}, timeout=60) as answer,
        ):
            pieces = answer.iter_bytes()
            assert next(pieces).startswith(b"data: one\n\n")
            heard.set()
            assert b"".join(pieces).endswith(b"data: two\n\n")


class TestKeys:
    @pytest.mark.parametrize("given", [None, "", "Bearer", f"Bearer {THIRD}", f"Basic {FIRST}", FIRST, "Bearer é"])
    @pytest.mark.parametrize("path", [CHAT, "/v1/models", "//v1/models/", "/v1/none"])
    def test_a_request_below_v1_without_a_valid_one_is_refused(self, given: str | None, path: str) -> None:
        with site(echo, config=KEYED) as server:
            headers = {} if given is None else {"authorization": given.encode()}
            response = send(server.url + path, content=b"x", **headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        error = error_of(response)
        assert (error["type"], error["code"]) == ("authentication_error", Code.INVALID_API_KEY)
        assert THIRD not in error["message"]
        assert server.ended == []

    @pytest.mark.parametrize("given", [f"Bearer {FIRST}", f"bearer {SECOND}"])
    def test_each_valid_one_is_enough(self, given: str) -> None:
        with site(echo, config=KEYED) as server:
            assert send(server.url + CHAT, content=b"x", authorization=given).content == b"x"

    def test_other_paths_and_preflights_need_none(self) -> None:
        with site(echo, config=HttpConfig(api_key=(FIRST,), allowed_origins=(ORIGIN,))) as server:
            assert send(server.url + "/page", "GET").status_code == 200
            assert send(server.url + CHAT, "OPTIONS", origin=ORIGIN, **TestOrigins.PREFLIGHT).status_code == 200
            refused = send(server.url + CHAT, origin=ORIGIN)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)

    def test_they_may_be_in_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_text(f"{FIRST}\n\n  {SECOND}  \n")
        with site(echo, config=HttpConfig(api_key_file=file)) as server:
            answers = [
                send(server.url + CHAT, authorization=f"Bearer {key}").status_code for key in (FIRST, SECOND, THIRD)
            ]
        assert answers == [200, 200, 401]

    @pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff"])
    def test_a_file_without_keys_is_refused(self, tmp_path: Path, content: bytes | None) -> None:
        file = tmp_path / "keys"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ConfigurationError, match="--api-key-file"):
            FrontDoor([], HttpConfig(api_key_file=file))

    @pytest.mark.parametrize("key", ["", "k", "k" * 15, "two words, each of them long", "é" * 16, "k" * 16 + "\n"])
    def test_one_that_is_short_or_that_a_header_cannot_carry_is_refused(self, tmp_path: Path, key: str) -> None:
        with pytest.raises(ConfigurationError, match="--api-key or CHIASM_API_KEY: a key must") as refusal:
            HttpConfig(api_key=(FIRST, key))
        assert len(key) < 2 or key not in refusal.value.message

    def test_a_short_one_in_a_file_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_text(f"{FIRST}\nshort\n")
        with pytest.raises(ConfigurationError, match="--api-key-file: a key must"):
            FrontDoor([], HttpConfig(api_key_file=file))

    def test_a_file_that_others_may_write_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_text(FIRST)
        file.chmod(0o662)
        with pytest.raises(ConfigurationError, match="writable by every user"):
            FrontDoor([], HttpConfig(api_key_file=file))

    def test_a_file_that_is_replaced_is_read_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(watch, "INTERVAL_SECONDS", 0.01)
        file, new = tmp_path / "keys", tmp_path / "new"
        file.write_text(FIRST)
        new.write_text(SECOND)
        with site(echo, config=HttpConfig(api_key_file=file)) as server:
            assert send(server.url + CHAT, authorization=f"Bearer {FIRST}").status_code == 200
            new.rename(file)
            assert eventually(lambda: send(server.url + CHAT, authorization=f"Bearer {SECOND}").status_code == 200)
            assert send(server.url + CHAT, authorization=f"Bearer {FIRST}").status_code == 401

    def test_a_key_beyond_its_limit_is_refused_before_its_body_is_read_and_others_are_not(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_text(f"keys: [{{key: {FIRST}, max_requests_per_minute: 1}}, {{key: {SECOND}}}]")
        with site(echo, config=HttpConfig(api_key_file=file)) as server:
            send(server.url + "/v1/models", "GET", authorization=f"Bearer {FIRST}")  # doesn't count
            statuses = [
                send(server.url + CHAT, content=b"x", authorization=f"Bearer {key}").status_code
                for key in (FIRST, FIRST, SECOND)
            ]
            refused = send(server.url + CHAT, content=b"x", authorization=f"Bearer {FIRST}")
        assert statuses == [200, 429, 200]
        assert 0 < int(refused.headers["retry-after"]) <= 60
        error = error_of(refused)
        assert (error["type"], error["code"]) == ("rate_limit_error", Code.RATE_LIMIT_EXCEEDED)
        assert len(server.ended) == 2

    def test_a_request_leaves_its_place_however_it_ends(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_text(f"keys: [{{key: {FIRST}, max_requests_in_flight: 1}}]")
        with site(raising(ValueError("x")), config=HttpConfig(api_key_file=file)) as server:
            statuses = {send(server.url + CHAT, authorization=f"Bearer {FIRST}").status_code for _ in range(3)}
        assert statuses == {500}

    def test_those_of_the_instances_may_be_short(self) -> None:
        with site(echo, config=HttpConfig(keys_of_instances=("k",))) as server:
            statuses = [send(server.url + CHAT, authorization=f"Bearer {key}").status_code for key in ("k", "x")]
        assert statuses == [200, 401]
        with pytest.raises(ConfigurationError, match="empty"):
            HttpConfig(keys_of_instances=("",))

    def test_they_are_not_in_the_configurations_text(self) -> None:
        assert FIRST not in repr(KEYED)


class TestTimingComments:
    @pytest.mark.parametrize(
        ("default", "given", "wanted"),
        [("on", None, True), ("off", None, False), ("on", "off", False), ("off", "ON", True), ("off", "?", False)],
    )
    def test_a_request_may_choose(self, default: str, given: str | None, wanted: bool) -> None:
        async def tell(exchange: Exchange) -> None:
            await exchange.reply(str(exchange.timing_comments).encode())

        with site(tell, config=HttpConfig(timing_comments=default)) as server:
            headers = {} if given is None else {"x_timing_comments": given}
            assert send(server.url, **headers).text == str(wanted)


class TestLog:
    """A line is checked when the server has ended: it is written after the answer."""

    @pytest.fixture
    def lines(self, caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
        caplog.set_level(logging.INFO)

        def read() -> list[str]:
            return [
                record.getMessage() for record in caplog.records if record.name in ("chiasm.requests", "chiasm.access")
            ]

        return read

    @pytest.mark.parametrize(
        ("handler", "path", "line"),
        [
            (
                raising(InvalidRequestError("Wrong.", code=Code.INVALID_URL)),
                "/?key=secret",
                "id=me POST / status=400 code=invalid_url: Wrong.",
            ),
            (
                raising(OverloadedError("Full.", code=Code.STARTING)),
                "/",
                "id=me POST / status=503 code=starting: Full.",
            ),
            (breaking, "/", "id=me POST / status=200 code=stopping: No more."),
            (
                echo,
                "/a%0Ab%20status=200",
                "id=me POST /a%0Ab%20status=200 status=404 code=not_found_error: POST /a\\nb status=200: nothing is served "
                "under this path.",
            ),
        ],
    )
    def test_each_failure_leaves_one_line(
        self, handler: Any, path: str, line: str, lines: Callable[[], list[str]]
    ) -> None:
        with site(handler) as server:
            send(server.url + path, x_request_id="me")
        assert lines() == [line]

    def test_what_succeeds_leaves_none(self, lines: Callable[[], list[str]]) -> None:
        for handler in (echo, streaming):
            with site(handler) as server:
                assert send(server.url, content=b"x").status_code == 200
        assert lines() == []

    def test_a_client_that_leaves_is_noted_as_such(self, lines: Callable[[], list[str]]) -> None:
        entered = threading.Event()

        async def wait(exchange: Exchange) -> None:
            entered.set()
            await never(exchange)

        with site(wait) as server:
            connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
            connection.request("POST", "/", b"x", {"x-request-id": "me"})
            assert entered.wait(20)
            connection.close()
            assert eventually(lambda: server.ended == [499])
        assert lines() == ["id=me POST / status=499 code=client_left: The client left."]

    @pytest.mark.parametrize(
        ("message", "shown"),
        [
            ("a\nb\x1b[31m", "a\\nb\\x1b[31m"),
            ("x" * 1000, "x" * 300),
            ("https://h/a.png?X-Signature=secret did not respond.", "https://h/a.png?… did not respond."),
            ("data:image/png;base64,AAAABBBBCCCCDDDD is bad", "data:… is bad"),
            ("Field required, 'input': {'prompt': 'secret'}", "Field required, …"),
            ("The body is not valid JSON, near 'secret'.", "The body is not valid JSON, …"),
            ("bad [type=x, input_value='secret', input_type=str]", "bad [type=x, …"),
        ],
    )
    def test_a_reason_is_escaped_and_cut_and_gives_nothing_away(
        self, message: str, shown: str, lines: Callable[[], list[str]]
    ) -> None:
        with site(raising(InvalidRequestError(message))) as server:
            send(server.url)
        assert lines()[0].partition(": ")[2] == shown

    def test_a_flood_of_failures_is_counted(self, lines: Callable[[], list[str]]) -> None:
        """A slow machine may spread it over two of the periods in which lines are limited."""
        with site(echo) as server, httpx.Client(timeout=60) as client:
            for _ in range(LINES_PER_WINDOW + 7):
                client.post(f"{server.url}/none")
            client.get(server.url)
        written = lines()
        failures = sum(line.startswith("id=") for line in written)
        counted = sum(int(line.split()[0]) for line in written if "more like these" in line)
        assert failures + counted == LINES_PER_WINDOW + 8
        assert failures < LINES_PER_WINDOW + 8 or counted == 0

    def test_an_access_log_has_a_line_for_every_request(self, lines: Callable[[], list[str]]) -> None:
        async def answer(exchange: Exchange) -> None:
            await exchange.reply(
                b'{"choices":[{"text":"\\"usage\\": 1"}],"usage":{"prompt_tokens":12,"completion_tokens":3}}'
            )

        with site(answer, config=HttpConfig(access_log="all")) as server:
            send(server.url, x_request_id="a")
            send(f"{server.url}/page", "GET", x_request_id="b")
        first, second = lines()
        took = r"seconds=\d+\.\d+ first_ms=\d+\.\d+"
        assert re.fullmatch(f"id=a POST / status=200 prompt_tokens=12 completion_tokens=3 {took}", first)
        assert re.fullmatch(f"id=b GET /page status=200 {took}", second)

    @pytest.mark.parametrize(("access_log", "asked"), [("failures", 0), ("requests", 1)])
    def test_stages_are_summed_up_only_for_a_line(
        self, access_log: str, asked: int, lines: Callable[[], list[str]]
    ) -> None:
        calls = 0

        def stages() -> dict[str, float]:
            nonlocal calls
            calls += 1
            return {"encode": 0.0123}

        async def answer(exchange: Exchange) -> None:
            exchange.visit.stages = stages
            await exchange.reply(b"{}")

        with site(answer, config=HttpConfig(access_log=access_log)) as server:
            send(server.url)
        assert (calls, sum("encode_ms=12.3" in line for line in lines())) == (asked, asked)

    def test_a_request_that_fails_has_one_line_in_it_too(self, lines: Callable[[], list[str]], tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_text(f"keys: [{{key: {FIRST}, name: team}}]")
        config = HttpConfig(access_log="all", api_key_file=file)
        with site(raising(InvalidRequestError("Wrong.", code=Code.INVALID_URL)), config=config) as server:
            send(server.url + CHAT, x_request_id="a", authorization=f"Bearer {FIRST}")
        (line,) = lines()
        assert re.fullmatch(rf"id=a POST {CHAT} status=400 key=team seconds=\d+\.\d+ code=invalid_url: Wrong\.", line)

    def test_what_is_logged_meanwhile_has_the_id_and_json_has_members(self) -> None:
        async def answer(exchange: Exchange) -> None:
            exchange.visit.details["images"] = 2
            exchange.visit.stages = lambda: {"encode": 0.0123}
            logging.getLogger("test").warning("a line of %s", "it")
            await exchange.reply(b"{}")

        written: dict[str, list[str]] = {}
        for name in ("text", "json"):
            stream = io.StringIO()
            handler = logging.StreamHandler(stream)
            handler.setFormatter(formatter(name))
            logging.getLogger().addHandler(handler)
            try:
                with site(answer, config=HttpConfig(access_log="all")) as server:
                    send(server.url, x_request_id="a")
            finally:
                logging.getLogger().removeHandler(handler)
            of_test = ("WARNING test:", "chiasm.access", '"logger":"test"')
            written[name] = [line for line in stream.getvalue().splitlines() if any(one in line for one in of_test)]
        during, after = written["text"]
        assert during.endswith("WARNING test: id=a a line of it")
        assert re.search(
            r"chiasm\.access: id=a POST / status=200 images=2 seconds=\S+ first_ms=\S+ encode_ms=12\.3$", after
        )
        during_json, after_json = map(json.loads, written["json"])
        assert (during_json["id"], during_json["message"], during_json["level"]) == ("a", "a line of it", "warning")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", during_json["time"])
        assert after_json.keys() == {
            *("time", "level", "logger", "id", "method", "path", "status", "images", "seconds", "first_ms", "encode_ms")
        }


class TestCompressedBodies:
    BODY = b'{"messages": "' + bytes(range(32, 34)) * 300 + b'"}'

    @pytest.mark.parametrize(
        ("coding", "data"),
        [
            ("gzip", gzip.compress(BODY)),
            ("GZIP", gzip.compress(BODY[:100]) + gzip.compress(BODY[100:])),
            ("x-gzip", gzip.compress(BODY)),
            ("deflate", zlib.compress(BODY)),
            ("deflate", zlib.compress(BODY, wbits=-15)),
            ("identity", BODY),
            ("", BODY),
        ],
    )
    def test_they_are_read(self, coding: str, data: bytes) -> None:
        with site(echo) as server:
            assert send(server.url, content=data, content_encoding=coding).content == self.BODY

    @pytest.mark.parametrize("size", [1, 65_535, 65_536, 65_537, 400_000])
    @pytest.mark.parametrize("wbits", [31, 15, -15])
    def test_any_size_comes_out_whole(self, size: int, wbits: int) -> None:
        body = bytes(index * index % 251 for index in range(min(size, 1000))) * (size // 1000 + 1)
        compressed = zlib.compress(body[:size], wbits=wbits)
        coding = "gzip" if wbits == 31 else "deflate"
        with site(echo, Bounds(20, 1 << 20), max_held_bytes=1 << 20) as server:
            assert send(server.url, content=compressed, content_encoding=coding).content == body[:size]

    @pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip", "gzip;q=1", "x" * 1000])
    def test_an_unknown_compression_is_refused_with_what_is_accepted(self, coding: str) -> None:
        with site(echo) as server:
            response = send(server.url, content=b"x", content_encoding=coding)
        error = error_of(response)
        assert (response.status_code, error["code"]) == (415, Code.UNSUPPORTED_ENCODING)
        assert "gzip or deflate" in error["message"]
        assert len(error["message"]) < 300
        assert response.headers["accept-encoding"] == "gzip, deflate"

    @pytest.mark.parametrize(
        ("coding", "data"),
        [
            ("gzip", b"no gzip"),
            ("gzip", b""),
            ("gzip", gzip.compress(BODY)[:-1]),
            ("gzip", gzip.compress(BODY)[:20]),
            ("gzip", gzip.compress(BODY) + b"more"),
            ("gzip", gzip.compress(BODY)[:-8] + bytes(8)),
            ("deflate", zlib.compress(BODY)[:-1]),
            ("deflate", zlib.compress(BODY) * 2),
            ("deflate", b"\xff\xff"),
        ],
    )
    def test_a_corrupt_one_is_refused(self, coding: str, data: bytes) -> None:
        with site(echo) as server:
            response = send(server.url, content=data, content_encoding=coding)
        assert (response.status_code, error_of(response)["code"]) == (400, Code.INVALID_ENCODING)
        assert server.admission.held_bytes == 0

    def test_the_header_given_twice_means_compressed_twice(self) -> None:
        with site(echo) as server:
            headers = [("content-encoding", "gzip"), ("content-encoding", "gzip")]
            response = httpx.post(server.url, content=gzip.compress(b"x"), headers=headers, timeout=60)
        assert response.status_code == 415

    def test_the_limits_hold_for_what_comes_out(self) -> None:
        bomb = gzip.compress(bytes(50_000_000))
        with site(echo, Bounds(20, 100_000), max_held_bytes=150_000) as server:
            too_large = send(server.url, content=bomb, content_encoding="gzip")
        with site(echo, Bounds(20, 100_000_000), max_held_bytes=150_000) as server:
            too_much = send(server.url, content=bomb, content_encoding="gzip")
            assert server.admission.held_bytes == 0
        assert (too_large.status_code, error_of(too_large)["code"]) == (413, Code.BODY_TOO_LARGE)
        assert (too_much.status_code, error_of(too_much)["code"]) == (503, Code.TOO_MANY_REQUESTS)

    def test_members_that_hold_nothing_are_bounded_too(self) -> None:
        with site(echo) as server:
            response = send(server.url, content=gzip.compress(b"") * 100, content_encoding="gzip")
        assert response.status_code == 413


class TestMediaTypes:
    @pytest.mark.parametrize(
        "given",
        [
            "application/json",
            "Application/JSON; charset=utf-8",
            "application/problem+json",
            "application/octet-stream",
            "",
        ],
    )
    def test_json_and_what_names_nothing_is_read(self, given: str) -> None:
        with site(echo) as server:
            assert send(server.url, content=b"{}", content_type=given).status_code == 200

    def test_a_byte_order_mark_is_left_out(self) -> None:
        with site(echo) as server:
            assert send(server.url, content=b"\xef\xbb\xbf{}").content == b"{}"

    @pytest.mark.parametrize(
        "given", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
    )
    def test_anything_else_is_refused(self, given: str) -> None:
        with site(echo, BOUNDS) as server:
            response = send(server.url, content=b"{}", content_type=given)
        error = error_of(response)
        assert (response.status_code, error["code"]) == (415, Code.UNSUPPORTED_MEDIA_TYPE)
        assert "curl: -H 'Content-Type: application/json'" in error["message"]
