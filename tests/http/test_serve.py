"""A server as a process: signals end it, and what is open gets an end."""

from __future__ import annotations

import signal
import subprocess
import sys

import httpx2 as httpx
import pytest

PROGRAM = """
import asyncio
from starlette.applications import Starlette
from starlette.routing import Route
from chiasm.errors import Code, OverloadedError
from chiasm.http import Admission, Endpoint
from chiasm.http.endpoint import Bounds
from chiasm.http.listen import bind
from chiasm.http.serve import HttpServer, run

async def endless(exchange):
    await exchange.start_events()
    await exchange.write(b"data: one\\n\\n")
    await asyncio.Event().wait()

admission = Admission(10, 1000)
app = Starlette(routes=[Route("/", Endpoint(endless, admission, Bounds(60, 1000, 60)), methods=["POST"])])
stopping = OverloadedError("Shutting down.", code=Code.STOPPING)
server = HttpServer(
    app, grace_seconds=0.2, on_stop=lambda: print("stopping", flush=True),
    interrupt_all=lambda: admission.interrupt_all(stopping),
)
run(server, bind("127.0.0.1", 0), on_ready=lambda url: print(url, flush=True))
print("ended", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_quietly_and_ends_open_streams_with_an_error(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        url = process.stdout.readline().strip()
        with httpx.stream("POST", url, content=b"x", timeout=30) as response:
            chunks = response.iter_text()
            first = next(chunks)
            process.send_signal(number)
            rest = "".join(chunks)
        assert first == "data: one\n\n"
        assert '"code":"stopping"' in rest
        assert process.wait(30) == 0
        assert process.stdout.read().split() == ["stopping", "ended"]
        assert process.stderr.read() == ""
