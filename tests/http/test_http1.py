"""What clients with older or other protocols get."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import pytest

from chiasm.http import Exchange
from tests.http.serving import site

JSON = b"Content-Type: application/json\r\n"
JAVA = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
"""What the client of Java's standard library sends with each of its requests."""
WEB_SOCKET = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n"


async def echo(exchange: Exchange) -> None:
    await exchange.reply(exchange.body)


async def stream(exchange: Exchange) -> None:
    await exchange.start_events()
    await exchange.write(b"data: 1\n\n")
    await exchange.end_events(b"data: 2\n\n")


def sent(url: str, *pieces: bytes) -> bytes:
    """Everything that comes back until the server closes the connection; an answer makes room for the next piece."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=20) as client:
        for piece in pieces[:-1]:
            client.sendall(piece)
            client.recv(1)
        client.sendall(pieces[-1])
        received = b""
        while more := client.recv(1 << 16):
            received += more
    return received


def request(body: bytes, headers: bytes, version: bytes = b"1.1", method: bytes = b"POST") -> bytes:
    return b"%b / HTTP/%b\r\nHost: x\r\nContent-Length: %d\r\n%b\r\n%b" % (method, version, len(body), headers, body)


@pytest.mark.parametrize("offer", [JAVA, JAVA.replace(b"Upgrade, ", b"close, Upgrade, "), WEB_SOCKET])
def test_a_request_that_offers_another_protocol_keeps_its_body(offer: bytes) -> None:
    with site(echo) as served:
        received = sent(
            served.url, request(b'{"a": 1}', JSON + offer) + request(b"{}", JSON + b"Connection: close\r\n")
        )
    assert received.startswith(b"HTTP/1.1 200")
    assert b'{"a": 1}' in received


def test_its_body_may_come_later_in_chunks() -> None:
    head = (
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n" + JSON + JAVA + b"\r\n"
    )
    last = request(b"{}", JSON + b"Connection: close\r\n")
    with site(echo) as served:
        received = sent(served.url, head, b'8\r\n{"a": 1}\r\n0\r\n\r\n' + last)
    assert received.count(b"HTTP/1.1 200") == 2
    assert b'{"a": 1}' in received


def test_requests_behind_it_are_answered() -> None:
    pieces = request(b'{"a": 1}', JSON + JAVA) * 2 + request(b"{}", JSON + b"Connection: close\r\n")
    with site(echo) as served:
        received = sent(served.url, pieces)
    assert received.count(b"HTTP/1.1 200") == 3
    assert received.count(b'{"a": 1}') == 2


def test_a_tunnel_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    with site(echo) as served:
        received = sent(served.url, b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert received.startswith((b"HTTP/1.1 400", b"HTTP/1.1 404", b"HTTP/1.1 405"))
    assert "WebSocket" not in caplog.text


def test_a_stream_of_http_1_0_has_no_chunks() -> None:
    with site(stream) as served:
        received = sent(served.url, request(b"{}", JSON, version=b"1.0"))
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert body == b"data: 1\n\ndata: 2\n\n"


def test_a_whole_answer_of_http_1_0_has_its_length() -> None:
    with site(echo) as served:
        received = sent(served.url, request(b'{"a": 1}', JSON, version=b"1.0"))
    assert b"\r\ncontent-length: 8\r\n" in received
    assert received.endswith(b'\r\n\r\n{"a": 1}')
