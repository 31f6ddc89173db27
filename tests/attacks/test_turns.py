"""One client asks for more than its share of an instance; another one is answered beside it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from chiasm import checkpoints
from chiasm.engine import EngineConfig, create_engine
from chiasm.server import create_app
from chiasm.wire import Role
from tests.server.serving import eventually, get, post, serving

GOOD = {"prompt": "hello", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    engine = create_engine(
        EngineConfig(
            checkpoints.folder("demo"),
            Role.AGGREGATED,
            dtype="float32",  # in which the batch decides nothing
            threads=1,
            kv_cache_bytes=64 << 20,
        )
    )
    engine.start()
    try:
        with serving(create_app(engine, served_model_name="demo")) as url:
            yield url
    finally:
        engine.stop()


def sent(url: str, body: object, deadline_ms: int = 60_000) -> socket.socket:
    """Send a completion, and return the connection, on which nothing is read."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    assert host is not None
    data = json.dumps(body).encode()
    connection = socket.create_connection((host, port or 80))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Deadline-Ms: {deadline_ms}\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def metric(url: str, name: str) -> float:
    lines = get(f"{url}/metrics").body.decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_a_small_request_is_answered_while_one_of_many_answers_runs(url: str) -> None:
    alone = post(f"{url}/v1/completions", GOOD).json["choices"][0]["text"]
    large = {"prompt": ["hello"] * 8, "n": 16, "max_tokens": 1000, "ignore_eos": True}
    with sent(url, large):
        eventually(lambda: metric(url, "chiasm_requests_waiting") >= 64)
        reply = post(f"{url}/v1/completions", GOOD)
        assert (reply.status, reply.json["choices"][0]["text"]) == (200, alone)
        assert metric(url, "chiasm_requests_waiting") >= 64


def test_a_request_of_more_answers_than_its_share_is_refused(url: str) -> None:
    reply = post(f"{url}/v1/completions", {"prompt": ["hello"] * 15, "n": 16, "max_tokens": 2000})
    assert (reply.status, reply.error["param"]) == (400, "n")


def test_token_ids_without_end_are_refused(url: str) -> None:
    body = b'{"prompt":[' + b",".join([b"1"] * 3_000_000) + b"]}"
    reply = post(f"{url}/v1/completions", body)
    assert reply.status == 400
    assert "values" in reply.error["message"]


def test_a_stream_that_nobody_reads_ends_at_its_deadline(url: str) -> None:
    unread = {"prompt": "hello", "n": 16, "max_tokens": 400, "logprobs": 20, "stream": True, "ignore_eos": True}
    ended = metric(url, "chiasm_http_requests_total")
    with sent(url, unread, deadline_ms=1500):
        eventually(lambda: metric(url, "chiasm_http_requests_total") > ended)
        eventually(lambda: metric(url, "chiasm_http_requests_in_flight") == 0)
        assert post(f"{url}/v1/completions", GOOD).status == 200
