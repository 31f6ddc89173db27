"""Random requests to a server and to a proxy in front of it: none gets 500, and a good one is answered afterwards.

``CHIASM_FUZZ_SECONDS`` (10) says for how long.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chiasm.server import create_app
from chiasm.server.protocol import ChatRequest, CompletionRequest
from chiasm.wire import CHAT_PATH, COMPLETIONS_PATH, Role
from tests.server.conftest import MODEL, SMALL
from tests.server.fake_engine import FakeLanguageEngine
from tests.server.serving import serving

SECONDS = int(os.environ.get("CHIASM_FUZZ_SECONDS", "10"))
REQUESTS_PER_SECOND = 25
GOOD = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
FIELDS = sorted({field.name for kind in (ChatRequest, CompletionRequest) for field in msgspec.structs.fields(kind)})
INSIDE = (
    "role",
    "content",
    "type",
    "text",
    "image_url",
    "url",
    "uuid",
    "image_embeds",
    "image_size",
    "function",
    "name",
)
HEADERS = (
    "Accept",
    "Accept-Encoding",
    "Authorization",
    "Content-Encoding",
    "Content-Type",
    "Expect",
    "Host",
    "Origin",
    "Transfer-Encoding",
    "Upgrade",
    "X-Request-Deadline-Ms",
    "X-Request-Id",
    "X-Timing-Comments",
)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["user", "text", ""])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(INSIDE) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
chats = st.dictionaries(st.sampled_from(FIELDS), values, max_size=5).map(lambda fields: GOOD | fields)
prompts = st.dictionaries(st.sampled_from(FIELDS), values, max_size=5).map(lambda fields: {"model": MODEL} | fields)
bodies = (chats | prompts | values).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=200)
headers = st.dictionaries(
    st.sampled_from(HEADERS), st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=30), max_size=3
)


@pytest.fixture(scope="module")
def instance() -> Iterator[str]:
    engine = FakeLanguageEngine(Role.AGGREGATED, max_items=3)
    with serving(create_app(engine, served_model_name=MODEL, config=SMALL)) as url:
        yield url


@pytest.fixture(scope="module")
def proxy(instance: str) -> Iterator[str]:
    command = [sys.executable, "-m", "chiasm", "proxy", "--port", "0", "--aggregated", instance]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[1]
        finally:
            process.kill()


def status_of(url: str, path: str, body: bytes, fields: Mapping[str, str]) -> int | None:
    """Return the status, or None if the server closed without one."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    lines = {"Content-Type": "application/json", "X-Request-Deadline-Ms": "5000"} | dict(fields)
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    try:
        connection.connect()
        start = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{head}\r\n"
        connection.sock.sendall(start.encode("latin-1") + body)
        response = http.client.HTTPResponse(connection.sock, method="POST")
        response.begin()
        response.read()
    except (http.client.RemoteDisconnected, ConnectionError):
        return None
    finally:
        connection.close()
    return response.status


@pytest.mark.timeout(40 * SECONDS + 240)
@pytest.mark.parametrize("where", ["instance", "proxy"])
def test_no_request_gets_500(where: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(where)

    @settings(
        max_examples=SECONDS * REQUESTS_PER_SECOND // 2,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(path=st.sampled_from([CHAT_PATH, COMPLETIONS_PATH]), body=bodies, fields=headers)
    def send(path: str, body: bytes, fields: dict[str, Any]) -> None:
        assert status_of(url, path, body, fields) not in (500, 502)

    send()
    patient = {"X-Request-Deadline-Ms": "60000"}  # the machine may be busy
    assert status_of(url, CHAT_PATH, json.dumps(GOOD).encode(), patient) == 200
