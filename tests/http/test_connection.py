"""One connection: what follows a request that is being answered."""

from __future__ import annotations

import asyncio
import socket
import threading
from types import SimpleNamespace
from urllib.parse import urlsplit

from chiasm.http import Exchange
from chiasm.http.connection import _Closing
from chiasm.http.endpoint import Bounds
from tests.http.serving import site
from tests.http.test_endpoint import echo


class Waits:
    """Answers no request, and tells when one begins and when one is given up."""

    def __init__(self) -> None:
        self.entered, self.interrupted = threading.Event(), threading.Event()

    async def handle(self, exchange: Exchange) -> None:
        self.entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.interrupted.set()


def test_what_follows_a_request_does_not_spoil_its_answer() -> None:
    with site(echo) as server:
        parts = urlsplit(server.url)
        with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=30) as client:
            client.sendall(b"GET /page HTTP/1.1\r\nHost: x\r\n\r\n" + b"not HTTP\r\n\r\n")
            answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert answer.endswith(b"page")


def test_a_client_that_leaves_is_noticed_although_what_it_sent_last_was_no_request() -> None:
    waits = Waits()
    with site(waits.handle) as server:
        parts = urlsplit(server.url)
        with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=30) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n" + b"not HTTP\r\n\r\n")
            assert waits.entered.wait(20)
            assert not waits.interrupted.is_set()
        assert waits.interrupted.wait(20)


def test_a_client_that_leaves_is_noticed_behind_a_large_body() -> None:
    waits = Waits()
    size = 1 << 20  # so much that reading is paused meanwhile
    with site(waits.handle, Bounds(20, size), max_held_bytes=2 * size) as server:
        parts = urlsplit(server.url)
        with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=30) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))
            assert waits.entered.wait(20)
        assert waits.interrupted.wait(20)


class Written(asyncio.Transport):
    """Keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.pieces.append(bytes(data))


async def test_the_head_of_each_answer_goes_out_with_what_follows_it() -> None:
    written = Written()
    closing = _Closing(written, SimpleNamespace(loop=asyncio.get_running_loop()))  # type: ignore[arg-type]
    for _ in range(2):
        closing.write(b"head ")
        closing.write(b"one ")
        closing.write(b"two")
        closing.expect_head()
        closing.write(b"head without a body")
        closing.expect_head()
    assert written.pieces == [b"head one ", b"two", b"head without a body"] * 2


async def test_a_head_that_nothing_follows_does_not_wait() -> None:
    written = Written()
    closing = _Closing(written, SimpleNamespace(loop=asyncio.get_running_loop()))  # type: ignore[arg-type]
    closing.write(b"head")
    await asyncio.sleep(0)
    assert written.pieces == [b"head"]
    closing.write(b"body")
    assert written.pieces == [b"head", b"body"]
