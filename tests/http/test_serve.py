"""A server as a process: after a signal, what runs ends by itself or with an error, and nothing new begins."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import httpx2 as httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from chiasm.http.config import HttpConfig
from chiasm.http.limits import Refusals
from chiasm.http.listen import bind, url_of
from chiasm.http.serve import HttpServer

PROGRAM = """
import asyncio, sys
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
from chiasm.errors import Code, OverloadedError
from chiasm.http import Admission, Endpoint
from chiasm.http.config import HttpConfig
from chiasm.http.endpoint import Bounds
from chiasm.http.limits import Refusals
from chiasm.http.listen import bind
from chiasm.http.serve import HttpServer, run

go = asyncio.Event()
stopped = False
stopping = OverloadedError("Shutting down.", code=Code.STOPPING)

def stop():
    global stopped
    print("stopping", flush=True)
    stopped = True

def check(exchange):
    if stopped:
        raise stopping

async def stream(exchange):
    await exchange.start_events()
    await exchange.write(b"data: one\\n\\n")
    await go.wait()
    await exchange.end_events(b"data: [DONE]\\n\\n")

async def let_go(request):
    go.set()
    return Response()

config, refusals = HttpConfig(), Refusals()
admission = Admission(10, 1 << 20, config, refusals)
endpoint = Endpoint(stream, admission, Bounds(60, 1 << 20), on_start=check)
app = Starlette(routes=[Route("/", endpoint, methods=["POST"]), Route("/go", let_go)])
server = HttpServer(
    app, config, refusals, shutdown_timeout_seconds=float(sys.argv[1]), on_stop=stop, is_idle=lambda: not admission.requests,
    interrupt_all=lambda: admission.interrupt_all(stopping), has_parent="has_parent" in sys.argv,
)
run(server, bind("127.0.0.1", 0), on_ready=lambda url: print(url, flush=True))
print("ended", flush=True)
"""
LONG = "60"


@pytest.fixture(autouse=True)
def _without_nohup() -> Iterator[None]:
    """Processes get SIGHUP as from a terminal, also where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@contextlib.contextmanager
def server(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server whose stream ends when /go has been asked for; it must end quietly and with exit code 0."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            yield process, process.stdout.readline().strip()
            assert process.wait(60) == 0
            assert process.stdout.read().split()[-1] == "ended"
            assert process.stderr.read() == ""
        finally:
            process.kill()


def is_stopping(process: subprocess.Popen[str]) -> bool:
    """Wait until the signal has arrived."""
    assert process.stdout is not None
    return process.stdout.readline() == "stopping\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_after_a_signal_a_stream_ends_whole_and_nothing_new_begins(number: signal.Signals) -> None:
    with server(LONG) as (process, url), httpx.stream("POST", url, content=b"x", timeout=60) as response:
        chunks = response.iter_text()
        assert next(chunks) == "data: one\n\n"
        process.send_signal(number)
        assert is_stopping(process)
        refused = httpx.post(url, content=b"x" * (1 << 19), timeout=60)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "stopping"
        assert refused.headers["connection"] == "close"
        httpx.get(f"{url}/go", timeout=60)
        assert "".join(chunks) == "data: [DONE]\n\n"


def test_a_server_under_nohup_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with server(LONG) as (process, url):
            process.send_signal(signal.SIGHUP)
            assert httpx.get(f"{url}/go", timeout=60).status_code == 200
            process.send_signal(signal.SIGTERM)
            assert is_stopping(process)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_ends_a_stream_at_once_with_an_error() -> None:
    with server(LONG) as (process, url), httpx.stream("POST", url, content=b"x", timeout=60) as response:
        chunks = response.iter_text()
        assert next(chunks) == "data: one\n\n"
        process.send_signal(signal.SIGTERM)
        assert is_stopping(process)
        process.send_signal(signal.SIGTERM)
        rest = "".join(chunks)
        assert '"code":"stopping"' in rest
        assert "[DONE]" not in rest


def test_a_stream_ends_whole_if_its_server_gets_sigterm_from_systemd_and_from_its_parent() -> None:
    with (
        server(LONG, "has_parent") as (process, url),
        httpx.stream("POST", url, content=b"x", timeout=60) as response,
    ):
        chunks = response.iter_text()
        assert next(chunks) == "data: one\n\n"
        process.send_signal(signal.SIGTERM)
        assert is_stopping(process)
        process.send_signal(signal.SIGTERM)
        assert httpx.post(url, content=b"x", timeout=60).status_code == 503
        httpx.get(f"{url}/go", timeout=60)
        assert "".join(chunks) == "data: [DONE]\n\n"


def test_a_parent_hurries_a_server_by_sigint() -> None:
    with (
        server(LONG, "has_parent") as (process, url),
        httpx.stream("POST", url, content=b"x", timeout=60) as response,
    ):
        chunks = response.iter_text()
        assert next(chunks) == "data: one\n\n"
        process.send_signal(signal.SIGTERM)
        assert is_stopping(process)
        process.send_signal(signal.SIGINT)
        assert '"code":"stopping"' in "".join(chunks)


def test_a_stream_that_outlasts_the_timeout_ends_with_an_error() -> None:
    with server("0.2") as (process, url), httpx.stream("POST", url, content=b"x", timeout=60) as response:
        chunks = response.iter_text()
        assert next(chunks) == "data: one\n\n"
        process.send_signal(signal.SIGTERM)
        assert '"code":"stopping"' in "".join(chunks)


async def test_a_server_that_ends_waits_for_a_client_that_reads_the_end_of_its_answer_slowly() -> None:
    body, config, refusals = b"x" * 200_000, HttpConfig(), Refusals()

    async def answer(request: Request) -> Response:
        return Response(body)

    async def page(request: Request) -> Response:
        return Response(b"page")

    server = HttpServer(
        Starlette(routes=[Route("/", answer), Route("/page", page)]),
        config,
        refusals,
        shutdown_timeout_seconds=0.0,
        on_stop=lambda: None,
        is_idle=lambda: True,
        interrupt_all=lambda: None,
    )
    listener, loop = bind("127.0.0.1", 0), asyncio.get_running_loop()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that the answer stays in the process
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await server.ready.wait()
    async with httpx.AsyncClient(timeout=60) as others:
        with socket.socket() as slow:
            slow.setblocking(False)
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await loop.sock_connect(slow, listener.getsockname())
            await loop.sock_sendall(slow, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            while not server._connections.are_sending:
                await others.get(f"{url_of(listener)}/page")
            server.drain()
            for _ in range(100):
                assert (await others.get(f"{url_of(listener)}/page")).content == b"page"
            received = b""
            while piece := await loop.sock_recv(slow, 1 << 16):
                received += piece
    assert received.endswith(b"\r\n\r\n" + body)
    await asyncio.wait_for(serving, 60)
