"""One connection: what follows a request that is being answered."""

from __future__ import annotations

import asyncio
import socket
import threading
from urllib.parse import urlsplit

from chiasm.http import Exchange
from tests.http.serving import site
from tests.http.test_endpoint import echo


def test_what_follows_a_request_does_not_spoil_its_answer() -> None:
    with site(echo) as server:
        parts = urlsplit(server.url)
        with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=30) as client:
            client.sendall(b"GET /page HTTP/1.1\r\nHost: x\r\n\r\n" + b"not HTTP\r\n\r\n")
            answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert answer.endswith(b"page")


def test_a_client_that_leaves_is_noticed_although_what_it_sent_last_was_no_request() -> None:
    entered, interrupted = threading.Event(), threading.Event()

    async def handler(exchange: Exchange) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            interrupted.set()

    with site(handler) as server:
        parts = urlsplit(server.url)
        with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=30) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n" + b"not HTTP\r\n\r\n")
            assert entered.wait(20)
            assert not interrupted.is_set()
        assert interrupted.wait(20)
